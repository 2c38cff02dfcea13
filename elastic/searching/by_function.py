"""A search in memory, whose accuracy and latency are any functions of the compact model: the same
loop, sampler and beliefs as `elastic.searching.study`, without a run directory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import optuna

from elastic.config import TableConfig, TimingConfig
from elastic.config.search import limits_accuracy_alone
from elastic.console import counting, say
from elastic.errors import BudgetError, ConfigError, RunError, unknown
from elastic.formats import graphs
from elastic.latency.cost_table import Table
from elastic.latency.latency_table import Timetable, known_timetable, record
from elastic.latency.target import Target, sizes_of
from elastic.models.kinds import Kind, kind_of
from elastic.searching.budget import met
from elastic.searching.loop import Loop, enqueue_starts
from elastic.searching.pareto import non_dominated
from elastic.searching.sampler import AdditiveSampler, learn
from elastic.searching.workers import Alone
from elastic.spaces.bound import Candidate, SubAdapter
from elastic.spaces.candidates import CandidateSpace
from elastic.supernet.compact import compact
from elastic.supernet.cost import Counter
from elastic.supernet.supernet import Supernet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Function = Callable[["PreTrainedModel"], float]
"""Of a compact model, which it must leave as it is: it shares tensors with the supernet."""
Counted = Literal["params", "macs"]
Measured = Literal["prefill_ms", "decode_ms"]
EXACT = 10**6
"""Examples that an accuracy without noise is as good as the share of."""
SCORED = "scored"


@dataclass(frozen=True)
class Scored:
    """One sub-adapter that a search has evaluated."""

    sub_adapter: SubAdapter
    accuracy: float
    """What the function said."""
    latency: float
    """What was asked for: of a function, of a table, or counted."""
    params: int
    """Of the compact model."""
    macs: int
    """Of its linear layers, per token."""
    degree: float = 0.0
    """How much of what it cuts it makes up for."""
    estimate: float = math.nan
    """The accuracy less its noise, as all evaluations together tell it."""

    @property
    def is_finite(self) -> bool:
        """Whether both are numbers."""
        return math.isfinite(self.accuracy) and math.isfinite(self.latency)

    def numbers(self) -> dict[str, float]:
        """What was measured."""
        names = ("accuracy", "latency", "params", "macs", "degree")
        return {name: getattr(self, name) for name in names}

    def as_dict(self) -> dict[str, Any]:
        """What was measured, for JSON."""
        return self.numbers()

    def budget_values(self) -> dict[str, float]:
        """What limits are held against, by their names."""
        known = self.accuracy if math.isnan(self.estimate) else self.estimate
        return {"latency": self.latency, "min_accuracy": known}

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.4g}, latency {self.latency:.4g}, {self.params:,} params"


@dataclass(frozen=True)
class ParetoFront:
    """What a search found: sub-adapters within the limits that no other one beats, the cheapest
    first. A sequence of them."""

    members: tuple[Scored, ...]
    best: Scored
    """The most accurate; where accuracy alone is limited the cheapest."""
    full: Scored
    """The maximal sub-adapter."""
    scored: tuple[Scored, ...]
    """All that were evaluated, in that order."""
    study: optuna.Study

    def __iter__(self) -> Iterator[Scored]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, number: int) -> Scored:
        return self.members[number]

    def __str__(self) -> str:
        """A table, whose best row is marked."""
        lines = [f"{'':6}{'accuracy':>10}{'latency':>18}{'params':>22}"]
        for one in self.members:
            mark = "best" if one == self.best else ""
            latency = f"{one.latency:.4g} ({one.latency / (self.full.latency or 1):.0%})"
            params = f"{one.params:,} ({one.params / self.full.params:.0%})"
            lines.append(f"{mark:6}{one.estimate:>10.4g}{latency:>18}{params:>22}")
        return "\n".join(lines)


def search(
    net: Supernet,
    accuracy: Function,
    latency: Function | Counted | Measured,
    *,
    degree: Callable[[SubAdapter], float],
    at_most: float | str | None = None,
    min_accuracy: float | None = None,
    trials: int = 50,
    starts: int = 12,
    examples: int | None = None,
    importance: Mapping[str, float] | None = None,
    timing: TimingConfig | None = None,
    study: optuna.Study | None = None,
    seed: int = 0,
) -> ParetoFront:
    """Evaluate sub-adapters up to `trials` (those of an earlier `study` count), return the front.

    `degree` says how much of what is cut a sub-adapter makes up for; `at_most` limits the latency,
    in its own unit or as "80%" of the full model's. An accuracy is the share of so many `examples`,
    which tells its noise; None: it has none. ConfigError for what is no number or limit,
    BudgetError where nothing meets the limits, RunError where nothing can be searched.
    """
    if net.space.size == 1:
        raise RunError("search: the space has one sub-adapter alone, so there is nothing to search")
    if trials < 2 or starts < 2:
        raise ConfigError(f"search: trials {trials}, starts {starts}: the two extremes need 2")
    if examples is not None and examples < 1:
        raise ConfigError(f"search: examples is {examples}; at least 1")
    is_number = isinstance(min_accuracy, Real) and math.isfinite(min_accuracy)
    if min_accuracy is not None and not is_number:
        raise ConfigError(f"search: min_accuracy is {min_accuracy!r}; give a finite number")
    mine = study is None
    if study is None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(directions=["maximize", "minimize"])
    elif [one.name for one in study.directions] != ["MAXIMIZE", "MINIMIZE"]:
        raise ConfigError('search: study: create it with directions=["maximize", "minimize"]')
    _absolute(at_most, 1.0)
    space = CandidateSpace.of(net.space, ())
    judge = _Judge(net, accuracy, latency, degree, timing or TimingConfig(), seed)
    loop = Loop(
        study, space, Alone(), ("accuracy", "latency"), SCORED,
        lambda candidate, kept: Scored(candidate.sub_adapter, **kept),
    )  # fmt: skip
    known = loop.seen()
    for end in (space.maximal(), space.minimal()):
        if end not in known:
            known[end] = judge(end.sub_adapter)
        if not known[end].is_finite:
            raise RunError(f"search: {known[end]}: accuracy and latency must be finite")
    full, least = known[space.maximal()], known[space.minimal()]
    limit = _absolute(at_most, full.latency)
    asked = {"latency": limit, "min_accuracy": min_accuracy}
    limits = {name: value for name, value in asked.items() if value is not None}
    if mine:
        room = None
        if limit is not None and full.latency != least.latency:
            room = (limit - least.latency) / (full.latency - least.latency)
        study.sampler = AdditiveSampler(
            space, examples=examples or EXACT, room=room, importance=importance, seed=seed,
            tables=[judge.table] if judge.table else [],
        )  # fmt: skip
    if not study.get_trials(deepcopy=False):
        enqueue_starts(study, space, starts, seed)

    def judged(candidate: Candidate, _: Mapping[Candidate, Scored]) -> Scored:
        return known.get(candidate) or judge(candidate.sub_adapter)

    with counting("searching", min(trials, space.size), len(loop.seen())) as steps:
        for count, _ in loop.run(judged, trials, limits):
            steps.to(count)
    # Of a study that others began the extremes may be none of its trials.
    scored = known | loop.seen()
    measured = {candidate: one.accuracy for candidate, one in scored.items()}
    estimates = np.array(list(measured.values()))
    if examples:
        estimates = learn(space, measured, examples, importance).fitted.clip(0, 1)
    told = tuple(
        replace(one, estimate=float(estimate))
        for one, estimate in zip(scored.values(), estimates, strict=True)
    )
    return _front(told, net.space.maximal(), limits, study)


class _Judge:
    """Evaluates a sub-adapter by the functions that were given."""

    def __init__(
        self,
        net: Supernet,
        accuracy: Function,
        latency: Function | Counted | Measured,
        degree: Callable[[SubAdapter], float],
        timing: TimingConfig,
        seed: int,
    ) -> None:
        self.net, self.accuracy, self.latency, self.degree = net, accuracy, latency, degree
        self.count = Counter(net.model, net.space)
        self.table: Table | None = None
        """What every choice saves; None where a function says so of whole models alone."""
        if latency in get_args(Measured):
            self.table = _timetable(net, timing, seed).tables[str(latency)]
        elif latency in get_args(Counted):
            self.table = Table.counted(net.space, self._counted)
        elif not callable(latency):
            known = [*get_args(Measured), *get_args(Counted)]
            raise ConfigError(f"search: {unknown('latency', str(latency), known)}, or a function")

    def __call__(self, sub: SubAdapter) -> Scored:
        degree, cost = self.degree(sub), self.count(sub)
        model = compact(self.net, sub, degree)
        if callable(self.latency):
            latency = _number(self.latency(model), "latency")
        elif self.latency in get_args(Counted):
            latency = self._counted(sub)
        else:
            assert self.table is not None
            latency = self.table(sub)
        accuracy = _number(self.accuracy(model), "accuracy")
        return Scored(sub, accuracy, latency, cost.params, cost.macs, degree)

    def _counted(self, sub: SubAdapter) -> float:
        return float(getattr(self.count(sub), str(self.latency)))


def _timetable(net: Supernet, timing: TimingConfig, seed: int) -> Timetable:
    """Of this model here: known, or measured now."""
    if kind_of(net.model) is Kind.CLASSIFIER:
        timing = replace(timing, new_tokens=0)
    device, dtype = "cpu", "float32"
    if timing.runtime != "torch":
        graphs.require(timing.runtime)
    else:
        device, dtype = str(net.model.device), str(net.model.dtype).removeprefix("torch.")
    sizes = sizes_of(net.model.config, net.declared, net.adapter.rank)
    target, table = Target.described(sizes, device, dtype, timing), TableConfig()
    known = known_timetable(target, table)
    found = Timetable.from_dict(known, net.space) if known else None
    found = found or record(net, target, timing, table, seed)
    say(found.describe())
    return found


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"search: {what} gave {value!r}; it must return one number") from None


def _absolute(limit: float | str | None, full: float) -> float | None:
    """A limit in the unit of what it limits; ConfigError for what is neither a number nor parts of
    the full model's."""
    if limit is None:
        return None
    try:
        text = str(limit)
        part = text.endswith("%")
        value = float(text.removesuffix("%")) / 100 * full if part else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f'search: at_most is {limit!r}; give a number, or parts such as "80%"')
    return value


def _front(
    scored: tuple[Scored, ...],
    maximal: SubAdapter,
    limits: Mapping[str, float],
    study: optuna.Study,
) -> ParetoFront:
    """Of those within the limits; BudgetError where there are none."""
    [full] = (one for one in scored if one.sub_adapter == maximal)
    within = [one for one in scored if met(one, limits)]
    if not within:
        fastest = min(scored, key=lambda one: one.latency)
        surest = max(scored, key=lambda one: one.estimate)
        raise BudgetError(
            f"search: no sub-adapter has latency up to {limits.get('latency')} and accuracy from "
            f"{limits.get('min_accuracy')}; the fastest: {fastest}; the most accurate: {surest}"
        )
    front = non_dominated([(one.latency, -one.estimate) for one in within])
    members = tuple(within[index] for index in front)
    cheapest = limits_accuracy_alone(limits)
    return ParetoFront(members, members[0 if cheapest else -1], full, scored, study)
