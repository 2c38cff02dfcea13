"""What every sub-adapter costs on a target: tables learnt from a few whole models, kept in a file.

A search then knows the latency of whatever it may propose, and measures only what it chose.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elastic.config import TableConfig, TimingConfig
from elastic.console import say
from elastic.errors import RunError
from elastic.evaluation import statistics
from elastic.files import read_json, write_json
from elastic.latency.bench import CANDIDATE, Bench, shape_of
from elastic.latency.cost_table import Table
from elastic.latency.measure import distrust
from elastic.latency.target import LATENCIES, Target
from elastic.models.packaged import cache_directory
from elastic.provenance import provenance
from elastic.run import Run
from elastic.spaces.bound import BoundSpace, Candidate, SubAdapter, generator_for

if TYPE_CHECKING:
    from elastic.supernet.supernet import Supernet


METRICS = (*LATENCIES, "memory_mb")
PARTS = operator.itemgetter("seen", "unseen", "asked", "control", "tolerance", "about")
"""What a table's file always has beside its target."""


@dataclass(frozen=True)
class Timed:
    """One sub-adapter, measured."""

    sub_adapter: SubAdapter
    values: Mapping[str, float]
    """By the names of `METRICS`."""

    def as_dict(self) -> dict[str, Any]:
        return {**self.values, "sub_adapter": self.sub_adapter.as_dict()}


@dataclass(frozen=True)
class Error:
    """Of a table on sub-adapters that it never saw."""

    mean: float
    """Of |predicted - measured| / measured."""
    rank_correlation: float | None
    """Spearman's; None of fewer than three, or of equal ones."""
    n: int

    def __str__(self) -> str:
        order = "" if self.rank_correlation is None else f", ranks {self.rank_correlation:.2f}"
        return f"{self.mean:.1%}{order}"


@dataclass(frozen=True)
class Timetable:
    """Tables of a target, by the names of `METRICS`. Call it to predict."""

    target: Target
    space: BoundSpace
    seen: Sequence[Timed]
    """What the tables are learnt from; the maximal sub-adapter is the first."""
    unseen: Sequence[Timed]
    asked: tuple[int, int]
    """How many to see and to keep unseen were asked for; a small space has fewer."""
    control: float
    """How much the full model differed from itself: the median over the measurements."""
    tolerance: float
    about: Mapping[str, Any]
    full: Mapping[str, float]
    """Latencies of the full model, not compressed, in the same rounds."""
    rounds: int
    """In which all took turns; 0 of an earlier version, which did not keep it."""

    @functools.cached_property
    def tables(self) -> dict[str, Table]:
        return {
            metric: Table.fit(
                self.space,
                {timed.sub_adapter: timed.values[metric] for timed in self.seen},
                merged=self.target.merged,
            )
            for metric in METRICS
        }

    def __call__(self, sub: SubAdapter) -> dict[str, float]:
        """By the names of `METRICS`."""
        return {metric: table(sub) for metric, table in self.tables.items()}

    @functools.cached_property
    def errors(self) -> dict[str, Error]:
        """By the names of `METRICS`; empty when nothing was left to be measured on."""
        found = {}
        for metric in METRICS if self.unseen else ():
            measured = np.array([timed.values[metric] for timed in self.unseen])
            if not measured.any():  # a classifier decodes nothing
                continue
            predicted = np.array([self(timed.sub_adapter)[metric] for timed in self.unseen])
            mean = float(np.mean(np.abs(predicted - measured) / measured))
            found[metric] = Error(mean, spearman(predicted, measured), len(measured))
        return found

    @property
    def trusted(self) -> bool:
        return self.control <= self.tolerance

    def describe(self) -> str:
        """One line: of what, how good."""
        target = self.target
        what = (
            f"{target.runtime}, {target.compress or target.dtype}, batch {target.batch}, prompt "
            f"{target.prompt_tokens} tokens on {target.device}"
        )
        n = len(self.unseen)
        errors = ", ".join(
            f"{metric.partition('_')[0]} {error}" for metric, error in self.errors.items()
        )
        good = f"; mean error on {n} sub-adapters it never saw: {errors}" if n else ""
        noisy = "" if self.trusted else f"; {distrust(self.control, self.tolerance)}"
        return f"Latency table of {len(self.seen)} sub-adapters ({what}){good}{noisy}"

    def beside(self, other: Timetable) -> Timetable:
        """In the unit of `other`, by what the full model took then and now."""
        unit = {name: other.full[name] / took if took else 1.0 for name, took in self.full.items()}

        def scaled(rows: Sequence[Timed]) -> list[Timed]:
            return [
                replace(row, values={k: v * unit.get(k, 1.0) for k, v in row.values.items()})
                for row in rows
            ]

        return replace(
            self, seen=scaled(self.seen), unseen=scaled(self.unseen), full=dict(other.full)
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "target": asdict(self.target),
            "seen": [timed.as_dict() for timed in self.seen],
            "unseen": [timed.as_dict() for timed in self.unseen],
            "errors": {metric: asdict(error) for metric, error in self.errors.items()},
            "asked": list(self.asked),
            "rounds": self.rounds,
            "control": self.control,
            "tolerance": self.tolerance,
            "about": dict(self.about),
            "full": dict(self.full),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], space: BoundSpace) -> Timetable:
        def timed(rows: Iterable[Mapping[str, Any]]) -> list[Timed]:
            return [
                Timed(
                    space.check(SubAdapter(tuple(row["sub_adapter"].items()))),
                    {metric: row[metric] for metric in METRICS},
                )
                for row in rows
            ]

        seen = timed(value["seen"])
        return cls(
            Target(**value["target"]), space, seen, timed(value["unseen"]), tuple(value["asked"]),
            value["control"], value["tolerance"], value["about"],
            value.get("full") or {name: seen[0].values[name] for name in LATENCIES},
            value.get("rounds", 0),
        )  # fmt: skip


def read_timetable(file: Path | str, here: Target, device: str | None = None) -> dict[str, Any]:
    """The contents of a table's file; RunError unless it is of this target, or recorded on
    `device` and of it otherwise. Reads no weights."""
    value: dict[str, Any] = read_json(file)
    theirs = _target_in(value, file)
    wanted = {**asdict(here), "device": device or here.device}
    for field in sorted(fields(Target), key=lambda field: field.name == "device"):
        a, b = getattr(theirs, field.name), wanted[field.name]
        if a == b:
            continue
        if field.name == "model":
            raise RunError(
                f"{file} was recorded for another model or search space; record one of this run: "
                f"elastic latency RUN --save {file}"
            )
        if field.name == "device":
            raise RunError(
                f"{file} was recorded on {a!r}, this is {b!r}; to search for that device, add "
                f"--table.target {a!r}"
            )
        setting = {"dtype": "model.", "compress": ""}.get(field.name, "timing.")
        raise RunError(f"{file} was recorded with {setting}{field.name} {a}, this is {b}")
    return value


def read_timetable_of(run: Run, file: Path | str) -> dict[str, Any]:
    """The contents of a table of this run's merged sub-adapters, recorded on whatever device and in
    whatever runtime; RunError for another one. Reads no weights."""
    theirs = _target_in(read_json(file), file)
    here = replace(theirs, model=Target.of(run, TimingConfig()).model, merged=True, compress=None)
    return read_timetable(file, here)


def _target_in(value: Any, file: Path | str) -> Target:
    """RunError for a file that is no table."""
    try:
        PARTS(value)
        return Target(**value["target"])
    except (TypeError, KeyError):
        raise RunError(
            f"{file} holds no latency table; record one with: elastic latency RUN --save {file}"
        ) from None


def known_timetable(target: Target, table: TableConfig) -> dict[str, Any] | None:
    """What was measured here before, for a model and space like these, of as many sub-adapters and
    in as many rounds."""
    file = _cache_file(target)
    if not file.is_file():
        return None
    found = read_timetable(file, target)
    has, wanted = (
        (*found["asked"], found.get("rounds", 0)),
        (table.seen, table.unseen, table.rounds),
    )
    return found if all(map(operator.ge, has, wanted)) else None


def record(
    net: Supernet, target: Target, timing: TimingConfig, table: TableConfig, seed: int
) -> Timetable:
    """Measure whole models, the full one beside every other, and keep what they say for the next
    search of such a model on this device, unless the machine was busy."""
    space, mode = net.space, target.compress
    maximal = space.maximal()
    chosen = _chosen(space, table.seen + table.unseen, seed, merged=timing.merged)
    asked = [maximal, *chosen] if mode else chosen  # as it is, the maximal one is the full model
    what = f" in {mode}" if mode else ""
    say(f"Timing {len(asked)} sub-adapters for the latency table{what}")
    turns = replace(timing, rounds=table.rounds, max_rounds=table.rounds)
    with Bench(net, turns, seed) as bench:
        timed = bench.together([Candidate(sub, mode) for sub in asked], "timing sub-adapters")
        found = list(zip(asked, timed, strict=True))
        memory = {sub: bench.memory_mb(Candidate(sub, mode)) for sub in (maximal, *chosen)}
        clocks = bench.state
    # Ratios of times taken in the same rounds, in the unit of the full model over all rounds.
    full = {
        metric: float(np.median([getattr(each.full, metric) for _, each in found]))
        for metric in LATENCIES
    }
    rows = [] if mode else [Timed(maximal, {**full, "memory_mb": memory[maximal]})]
    for sub, each in found:
        ratio = each.ratios[CANDIDATE]
        values = {metric: getattr(ratio, metric) * full[metric] for metric in full}
        rows.append(Timed(sub, {**values, "memory_mb": memory[sub]}))
    made = Timetable(
        target, space, rows[: table.seen + 1], rows[table.seen + 1 :], (table.seen, table.unseen),
        float(np.median([each.control for _, each in found])), timing.tolerance,
        {**provenance(str(net.model.device)), "clocks": clocks}, full, table.rounds,
    )  # fmt: skip
    if made.trusted:
        write_json(_cache_file(target), made.as_dict())
    return made


def _chosen(space: BoundSpace, count: int, seed: int, *, merged: bool) -> list[SubAdapter]:
    """The ladder, then stratified ones, of different speeds. The full model is measured anyway."""
    generator = generator_for(seed, "table")
    candidates = [space.maximal(), space.minimal(), *space.ladder()]
    candidates += [space.stratified(generator) for _ in range(20 * count)]
    found: dict[tuple[int, ...], SubAdapter] = {}
    for sub in candidates:
        found.setdefault(shape_of(space, sub, merged=merged), sub)
    return [*found.values()][1 : count + 1] or [space.minimal()]


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation; None of fewer than three, or where all are equal."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return statistics.spearman(a, b)


def _cache_file(target: Target) -> Path:
    return cache_directory() / "latency" / f"{target.digest[:16]}.json"
