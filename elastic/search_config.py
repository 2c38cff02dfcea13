"""Settings of the search and of timing: budgets, what is measured, where the study is kept.

As in `config`, a bad value is refused in `__post_init__`, and nothing heavy is imported.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from elastic.errors import ConfigError, require

ACCURACY = "accuracy"
_LATENCIES = {
    "prefill_ms": "prefill_ms",
    "decode_ms": "decode_ms",
    "tokens_per_second": "decode_ms",
}
"""Limits that name a latency, and which."""
_COSTS = {**_LATENCIES, "memory_mb": "memory_mb", "params": "params", "macs": "macs"}

RoundedTo = Literal["int8", "int8_sym", "int4", "int4_sym"]
"""Compressions whose codes follow from the weights alone, so that accuracy is known without a
graph."""

_LIMIT = re.compile(r"^(\d+(?:\.\d+)?)\s*%$")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Limits the chosen sub-adapter meets. A number is absolute, "80%" is relative to the full
    model; unset is no limit."""

    prefill_ms: float | str | None = None
    """Time to first token, milliseconds."""
    decode_ms: float | str | None = None
    """Time per further token, milliseconds."""
    tokens_per_second: float | str | None = None
    """At least so many further tokens per second, of all sequences of timing.batch together."""
    memory_mb: float | str | None = None
    """Weights, and what a prefill of timing.batch prompts keeps beside them at its peak, MB."""
    params: float | str | None = None
    macs: float | str | None = None
    """Multiply-accumulates of the linear layers per token."""
    min_accuracy: float | str | None = None
    """Fraction of validation examples, in [0, 1], or percent of the maximal sub-adapter's."""
    max_accuracy_drop: float | str | None = None
    """The same for what may be lost of the maximal sub-adapter's: 0.01 is one point."""

    def __post_init__(self) -> None:
        for name, value in self.limits().items():
            if isinstance(value, str):
                match = _LIMIT.match(value)
                try:
                    number = float(match[1]) if match else float(value)
                except ValueError:
                    raise ConfigError(
                        f"budget.{name} is {value!r}; give a number, or a percentage of the full "
                        'model such as "80%"'
                    ) from None
            else:
                number = value
            require(number > 0, f"budget.{name} is {value}; it must be positive")
        for name in ("min_accuracy", "max_accuracy_drop"):
            value = getattr(self, name)
            if isinstance(value, float | int):
                require(value <= 1, f"budget.{name} is {value}; a fraction in [0, 1]")

    def limits(self) -> dict[str, float | str]:
        """The limits that were set."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def resolved(self, full: Mapping[str, float]) -> dict[str, float]:
        """Absolute limits, given the full model's figures under the same names; its accuracy
        stands under `min_accuracy`, which is also what a limited drop becomes."""
        full = {**full, "max_accuracy_drop": full.get("min_accuracy", 0.0)}
        resolved = {}
        for name, value in self.limits().items():
            match = _LIMIT.match(value) if isinstance(value, str) else None
            resolved[name] = float(match[1]) / 100 * full[name] if match else float(value)
        if "max_accuracy_drop" in resolved:
            least = full["max_accuracy_drop"] - resolved.pop("max_accuracy_drop")
            resolved["min_accuracy"] = max(least, resolved.get("min_accuracy", 0.0))
        return resolved


@dataclass(frozen=True, kw_only=True)
class TimingConfig:
    """How latency is measured: the full model and the candidate take turns."""

    runtime: Literal["torch", "onnx", "openvino"] = "torch"
    """onnx and openvino run in float32."""
    merged: bool = True
    """Fold the factors into the weights first. Unmerged ones cost time, the more the larger their
    rank; torch only."""
    prompt_tokens: int = 64
    new_tokens: int = 4
    """Decode steps per round; a classifier has none."""
    batch: int = 1
    rounds: int = 5
    """At least this many rounds; more until IQR / median < 0.1."""
    max_rounds: int = 20
    """At most this many."""
    tolerance: float = 0.03
    """How much the full model may differ from itself before a measurement is called noisy."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "batch", "rounds"):
            require(getattr(self, name) >= 1, f"timing.{name} must be at least 1")
        require(self.new_tokens >= 0, "timing.new_tokens must be at least 0")
        require(
            self.max_rounds >= self.rounds,
            f"timing.max_rounds is {self.max_rounds}, below timing.rounds {self.rounds}",
        )
        require(
            self.merged or self.runtime == "torch",
            f"timing.merged false: what is written for {self.runtime} is merged; choose torch",
        )


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """The latency table: what every choice costs on the target, learnt from a few whole models."""

    file: list[str] = field(default_factory=list)
    """Tables written by `elastic latency --save`, of one device, one for every precision; where
    there is none, one is measured here, once for a model, device, runtime and shapes."""
    target: str | None = None
    """The device `file` was recorded on, when it is not this one."""
    seen: int = 9
    """Sub-adapters that the table is learnt from."""
    unseen: int = 4
    """Others, on which its error is measured."""

    def __post_init__(self) -> None:
        require(self.seen >= 2, f"table.seen is {self.seen}; at least 2")
        require(self.unseen >= 0, f"table.unseen is {self.unseen}; at least 0")
        require(
            self.target is None or bool(self.file),
            f"table.target {self.target!r}: say which file was recorded there, table.file",
        )


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Where the search is kept. Workers that name the same study share its trials."""

    storage: str | None = None
    """Unset: a journal file in RUN/search. The path of a journal file, sqlite:///FILE,
    postgresql+psycopg://USER:PASSWORD@HOST/DATABASE, or grpc://HOST:PORT (Optuna's proxy)."""
    name: str | None = None
    """Unset: the name of the run's directory."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Searches a trained super-adapter for its Pareto-optimal sub-adapters."""

    run: str = "runs/default"
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    trials: int = 50
    """Sub-adapters evaluated in all; running again continues up to this number."""
    sampler: Literal["additive", "nsga2", "nsga3", "tpe", "gp", "random"] = "additive"
    """additive: our own, which learns what every choice costs and proposes from the front that
    follows. The others are Optuna's."""
    population: int = 20
    """Of nsga2 and nsga3."""
    starts: int = 12
    """Trials given to the ladder (all groups at one fraction) and stratified sub-adapters."""
    objectives: list[
        Literal["accuracy", "prefill_ms", "decode_ms", "memory_mb", "params", "macs"]
    ] = field(default_factory=list)
    """accuracy and the costs to trade it against, the first of which is drawn; accuracy alone looks
    for the most accurate one within the budget. Unset: the study's own, in a new study accuracy and
    the latency that the budget limits, prefill_ms if it limits both or neither."""
    race: float = 0.05
    """Stop evaluating a sub-adapter that loses to a cheaper one on the same examples; the largest
    probability of stopping one that is as accurate as all those. 0 evaluates all to the end."""
    compress: list[RoundedTo] = field(default_factory=list)
    """Weights of so few bits as one more choice, at most one mode of every number of bits. Accuracy
    is that of the rounded weights, latency and memory those of compressed graphs: give
    timing.runtime onnx or openvino (extra `compress`)."""
    timing: TimingConfig = field(default_factory=TimingConfig)
    table: TableConfig = field(default_factory=TableConfig)
    test_front: int = 8
    """How many sub-adapters of the front are scored on the test split."""
    batch_tokens: int = 2048
    """Padded tokens per evaluation batch; the score does not depend on it."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.trials >= 2, f"trials is {self.trials}; the two extremes need 2")
        require(self.starts >= 2, f"starts is {self.starts}; the two extremes need 2")
        require(self.population >= 2, f"population is {self.population}; at least 2")
        require(self.test_front >= 1, f"test_front is {self.test_front}; at least 1")
        require(self.batch_tokens >= 1, f"batch_tokens is {self.batch_tokens}; at least 1")
        require(0 <= self.race < 0.5, f"race is {self.race}; choose from [0, 0.5)")
        require_graph(self.compress, self.timing)
        bits = [mode.partition("_")[0] for mode in self.compress]
        require(
            len(set(bits)) == len(bits),
            f"compress {', '.join(self.compress)}: the number of bits is what is chosen; give one "
            "mode for each",
        )
        given = self.objectives
        require(
            not given or ACCURACY in given,
            f"objectives {', '.join(given)}: accuracy must be one of them",
        )
        require(len(set(given)) == len(given), f"objectives {', '.join(given)}: one is named twice")

    @property
    def chosen_objectives(self) -> list[str]:
        """Accuracy first, then what is to be minimised."""
        if self.objectives:
            return [ACCURACY, *(name for name in self.objectives if name != ACCURACY)]
        latencies = {_LATENCIES[name] for name in self.budget.limits() if name in _LATENCIES}
        return [ACCURACY, "decode_ms" if latencies == {"decode_ms"} else "prefill_ms"]

    @property
    def costs(self) -> list[str]:
        """What a front is drawn against: the objectives beside accuracy; without any, what the
        budget limits; if that is nothing, prefill_ms."""
        limited = [_COSTS[name] for name in self.budget.limits() if name in _COSTS]
        return self.chosen_objectives[1:] or list(dict.fromkeys(limited)) or ["prefill_ms"]


def require_graph(compress: Collection[str], timing: TimingConfig) -> None:
    """ConfigError for compressed weights in a runtime that has none."""
    require(
        not compress or timing.runtime != "torch",
        f"compress {', '.join(compress)}: it is graphs whose weights are compressed; give "
        "timing.runtime onnx or openvino",
    )


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """Times one sub-adapter, as it would be deployed, against the full model; with `save`, records
    the latency table of this device instead."""

    run: str = "runs/default"
    sub_adapter: str = "best"
    compress: Literal["chosen", "none", RoundedTo] = "chosen"
    """The sub-adapter's weights have so few bits, the full model's not. chosen: as the search chose
    for it."""
    save: str | None = None
    """Where to write the table, for `elastic search RUN --table.file FILE`."""
    timing: TimingConfig = field(default_factory=lambda: TimingConfig(rounds=10))
    table: TableConfig = field(default_factory=TableConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        named = self.compress not in ("chosen", "none")
        require_graph([self.compress] if named else [], self.timing)
