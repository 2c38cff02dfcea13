"""`elastic latency`: times one sub-adapter here, or records the latency table of this device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from elastic.config import LatencyConfig
from elastic.console import say, wide
from elastic.errors import ConfigError, RunError
from elastic.files import write_json
from elastic.formats import compression
from elastic.latency.bench import CANDIDATE, Bench
from elastic.latency.latency_table import Timetable, record
from elastic.latency.measure import REFERENCE, Measurement, distrust, per_second
from elastic.latency.runtime import require_runtime, timing_of
from elastic.latency.target import Target
from elastic.provenance import provenance
from elastic.run import Run
from elastic.spaces.bound import Candidate
from elastic.supernet.store import load_run


@dataclass(frozen=True)
class LatencyReport:
    """One sub-adapter beside the full model."""

    name: str
    target: Target
    measurement: Measurement
    memory_mb: Mapping[str, float]
    about: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        own, full = self._figures(CANDIDATE), self._figures(REFERENCE)
        target = asdict(self.target)
        target.pop("model")
        return {
            "sub_adapter": self.name,
            **target,
            **own,
            **{f"full_{name}": value for name, value in full.items()},
            "rounds": self.measurement.rounds,
            "control": self.measurement.control,
            "clocks": self.about["clocks"],
            "versions": self.about["versions"],
        }

    def _figures(self, key: str) -> dict[str, float]:
        found = self.measurement.latencies[key]
        return {
            "prefill_ms": found.prefill_ms,
            "decode_ms": found.decode_ms,
            "tokens_per_second": per_second(self.target.batch, found.decode_ms),
            "memory_mb": self.memory_mb[key],
        }

    def show(self) -> None:
        from rich.table import Table

        target, console = self.target, wide()
        table = Table(
            title=f"{target.runtime}, {target.compress or target.dtype}, "
            f"{'' if target.merged else 'un'}merged, batch "
            f"{target.batch}, prompt {target.prompt_tokens} tokens"
        )
        columns = ["", "prefill ms", "decode ms", "tokens / s", "memory MB", "IQR / median"]
        for column in columns:
            table.add_column(column, justify="right" if column else "left")
        for key, name in ((REFERENCE, REFERENCE), (CANDIDATE, self.name)):
            spread = self.measurement.latencies[key].spread
            figures = [f"{value:.1f}" for value in self._figures(key).values()]
            table.add_row(name, *figures, f"{spread:.1%}")
        own, full = self._figures(CANDIDATE), self._figures(REFERENCE)
        ratios = (f"{own[key] / full[key]:.3f}" if full[key] else "" for key in own)
        table.add_row("ratio", *ratios, "")
        console.print(table)
        console.print(
            f"A/A control: {self.measurement.control:.1%} over {self.measurement.rounds} rounds"
        )
        if clocks := self.about["clocks"]:
            console.print("Clocks: " + ", ".join(f"{k} {v}" for k, v in clocks.items()))
        print(json.dumps(self.as_dict()))


@dataclass(frozen=True)
class TableReport:
    """A latency table, written to a file."""

    timetable: Timetable
    file: Path

    def show(self) -> None:
        say(self.timetable.describe())
        errors = {name: asdict(error) for name, error in self.timetable.errors.items()}
        print(json.dumps({"file": str(self.file), "errors": errors}))


def time_run(config: LatencyConfig) -> LatencyReport | TableReport:
    """Of a trained run; the sub-adapter is sliced, and merged unless `timing.merged` is false.

    ConfigError for settings that do not go together; RunError when the full model differs from
    itself by more than `timing.tolerance`.
    """
    if config.table.file:
        raise ConfigError("table.file is read by `elastic search`; to write one, give --save FILE")
    run = Run(config.run)
    trained = run.config()
    require_runtime(config.timing.runtime, trained.model)
    chosen = None if config.save else run.chosen(config.sub_adapter)
    as_chosen = chosen.compress if chosen and config.timing.runtime != "torch" else None
    mode = {"chosen": as_chosen, "none": None}.get(config.compress, config.compress)
    if mode:
        compression.check(mode, config.timing.runtime)
    config = replace(config, timing=timing_of(config.timing, trained.model))
    target = Target.of(run, config.timing, mode)
    _, _, net = load_run(run)
    if config.save:
        timetable = record(net, target, config.timing, config.table, config.seed)
        _refuse_noise(timetable.control, config)
        write_json(config.save, timetable.as_dict())
        return TableReport(timetable, Path(config.save))
    assert chosen is not None  # unless a table is recorded
    candidate = Candidate(chosen.at(net.space, config.seed), mode)
    if config.timing.runtime != "torch":
        say(f"Writing both models for {config.timing.runtime}")
    with Bench(net, config.timing, config.seed) as bench:
        found = bench(candidate)
        _refuse_noise(found.control, config)
        memory = {
            REFERENCE: bench.memory_mb(Candidate(net.space.maximal())),
            CANDIDATE: bench.memory_mb(candidate),
        }
        about = {**provenance(str(net.model.device)), "clocks": bench.state}
    return LatencyReport(chosen.name, target, found, memory, about)


def _refuse_noise(control: float, config: LatencyConfig) -> None:
    if control > config.timing.tolerance:
        kept = f"; {config.save} was not written" if config.save else ""
        raise RunError(
            f"{distrust(control, config.timing.tolerance)}{kept}. Stop what else is running, or "
            "say how much may be accepted with --timing.tolerance"
        )
