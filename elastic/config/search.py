"""Settings of `elastic search`: budgets, the study, what is optimised."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from elastic.config.compensation import CompensationConfig
from elastic.config.latency import RoundedTo, TableConfig, TimingConfig, require_graph
from elastic.config.numbers import require_numbers
from elastic.config.recovery import RecoveryConfig
from elastic.errors import ConfigError, require, unknown

Objective = Literal["accuracy", "prefill_ms", "decode_ms", "memory_mb", "params", "macs"]
ACCURACY: Objective = "accuracy"
AT_LEAST = ("min_accuracy", "tokens_per_second")
"""Limits from below; the others are from above."""
ACCURACIES = ("min_accuracy", "max_accuracy_drop")
TRACKERS = ("mlflow", "tensorboard", "trackio", "wandb")
"""Each is an extra of its name."""
_LATENCIES: dict[str, Objective] = {
    "prefill_ms": "prefill_ms",
    "decode_ms": "decode_ms",
    "tokens_per_second": "decode_ms",
}
"""Limits that name a latency, and which."""
_COSTS: dict[str, Objective] = {
    **_LATENCIES, "memory_mb": "memory_mb", "params": "params", "macs": "macs"
}  # fmt: skip
_LIMIT = re.compile(r"^(\d+(?:\.\d+)?)\s*%$")


def excess(name: str, value: float, limit: float) -> float:
    """How far a figure is past the limit of this name; at most 0 is met."""
    return limit - value if name in AT_LEAST else value - limit


def limits_accuracy_alone(limits: Mapping[str, float]) -> bool:
    """Then the cheapest that meets it is wanted, else the most accurate."""
    return set(limits) == {"min_accuracy"}


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
    """Parameters of the sliced and merged model."""
    macs: float | str | None = None
    """Multiply-accumulates of the linear layers per token."""
    min_accuracy: float | str | None = None
    """Fraction of validation examples, in [0, 1], or percent of the maximal sub-adapter's."""
    max_accuracy_drop: float | str | None = None
    """The same for what may be lost of the maximal sub-adapter's: 0.01 is one point."""

    def __post_init__(self) -> None:
        for name, value in self.limits().items():
            match = _LIMIT.match(str(value))
            try:
                number = float(match[1] if match else value)
            except ValueError:
                raise ConfigError(
                    f"budget.{name} is {value!r}; give a number, or a percentage of the full "
                    'model such as "80%"'
                ) from None
            require(number > 0, f"budget.{name} is {value}; it must be positive")
            require(number < math.inf, f"budget.{name} is {value}; it must be finite")
            if name in ACCURACIES:
                most, what = (100, "percentage up to 100%") if match else (1, "fraction in [0, 1]")
                require(number <= most, f"budget.{name} is {value}; a {what}")

    def limits(self) -> dict[str, float | str]:
        """The limits that were set."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def resolved(self, full: Mapping[str, float]) -> dict[str, float]:
        """Absolute limits, given the full model's figures under the same names; its accuracy
        stands under `min_accuracy`, which is also what a limited drop becomes."""
        full = {**full, "max_accuracy_drop": full.get("min_accuracy", 0.0)}
        resolved = {}
        for name, value in self.limits().items():
            match = _LIMIT.match(str(value))
            resolved[name] = float(match[1]) / 100 * full[name] if match else float(value)
        if "max_accuracy_drop" in resolved:
            least = full["max_accuracy_drop"] - resolved.pop("max_accuracy_drop")
            resolved["min_accuracy"] = max(least, resolved.get("min_accuracy", 0.0))
        return resolved


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Where the search is kept. Workers that name the same study share its trials."""

    storage: str | None = None
    """Unset: a journal file in RUN/search. The path of a journal file, sqlite:///FILE,
    postgresql+psycopg://USER:PASSWORD@HOST/DATABASE, or grpc://HOST:PORT (Optuna's proxy)."""
    name: str | None = None
    """Unset: the name of the run's directory."""


def without_password(storage: str) -> str:
    """`study.storage` as it may be shown and kept."""
    shown = re.sub(r"(://[^:/?]*):.*@", r"\1:***@", storage)
    return re.sub(r"(?i)([?&]\w*(?:password|passwd|pwd|secret|token)=)[^&]*", r"\1***", shown)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Searches a trained super-adapter for its Pareto-optimal sub-adapters."""

    run: str = "runs/default"
    """The run directory of a trained super-adapter."""
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
    """Trials given to the ladder (all groups at one fraction) and stratified sub-adapters; two, the
    extremes, where every choice has been tried alone."""
    screen: int = 32
    """Validation examples on which every choice of every group is first tried alone, for `sampler:
    additive`: how far its answers are from the full model's says what matters. At most
    compensation.examples, and fewer where the choices are so many that this would take longer than
    25 trials. 0: no choice is tried."""
    importance_examples: int = 64
    """Training examples whose gradients say what matters, for `sampler: additive`, where no choice
    is tried alone; 0: none are asked, which spares some seconds of a short search."""
    objectives: list[Objective] = field(default_factory=list)
    """accuracy and the costs to trade it against, the first of which is drawn; accuracy alone looks
    for the most accurate one within the budget. Unset: the study's own, in a new study accuracy and
    the latency that the budget limits, prefill_ms if it limits both or neither."""
    race: float = 0.05
    """Stop evaluating a sub-adapter that loses to a cheaper one on the same examples; the largest
    probability of stopping one that is as accurate as all those. 0 evaluates all to the end."""
    compensation: CompensationConfig = field(default_factory=CompensationConfig)
    recover: RecoveryConfig = field(default_factory=RecoveryConfig)
    """The front is trained on so, and ranked again: front.json has every sub-adapter before and
    after."""
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
    report_to: list[str] = field(default_factory=list)
    """Trackers that get the figures of every trial, then those of the front: tensorboard, wandb,
    mlflow, trackio (extras of these names). They stay on this machine unless the tracker's own
    variables say otherwise (WANDB_MODE=online, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID)."""
    seed: int = 0
    """Of all that is drawn: starts, proposals, the examples of a race."""

    def __post_init__(self) -> None:
        require_numbers(self)
        for name in self.report_to:
            require(name in TRACKERS, f"report_to: {unknown('tracker', name, TRACKERS)}")
        require(self.trials >= 2, f"trials is {self.trials}; the two extremes need 2")
        require(self.starts >= 2, f"starts is {self.starts}; the two extremes need 2")
        require(self.screen >= 0, f"screen is {self.screen}; at least 0")
        least = self.importance_examples
        require(least >= 0, f"importance_examples is {least}; at least 0")
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
    def chosen_objectives(self) -> list[Objective]:
        """Accuracy first, then what is to be minimised."""
        if self.objectives:
            return [ACCURACY, *(name for name in self.objectives if name != ACCURACY)]
        latencies = {_LATENCIES[name] for name in self.budget.limits() if name in _LATENCIES}
        return [ACCURACY, "decode_ms" if latencies == {"decode_ms"} else "prefill_ms"]

    @property
    def costs(self) -> list[Objective]:
        """What a front is drawn against: the objectives beside accuracy; without any, what the
        budget limits; if that is nothing, prefill_ms."""
        limited = [_COSTS[name] for name in self.budget.limits() if name in _COSTS]
        return self.chosen_objectives[1:] or list(dict.fromkeys(limited)) or ["prefill_ms"]
