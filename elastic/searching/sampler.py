"""The search's own Optuna sampler: an additive model of accuracy, and the front that it implies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from elastic.latency.additive import Additive, Posterior, cheapest
from elastic.latency.cost_table import Table, Tables, kinds, least, places, shares
from elastic.latency.latency_table import spearman
from elastic.searching.joint import Belief, Joint
from elastic.spaces.bound import Point, Space, generator_for
from elastic.spaces.candidates import CandidateSpace

BOLDNESS = 0.25
"""How far a proposal follows a draw from the belief instead of its mean. At 1 (Thompson sampling)
fifty evaluations of ninety-six groups leave the belief too wide; at 0 two workers propose the
same."""
ATTEMPTS = 8
"""Proposals of one trial that were all known before a neighbour of the last will do."""
BEGIN, FORESEEN = 6, 4
"""Evaluations before the first that is predicted, and the fewest that say how well."""
GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, fill [0, 1] evenly however many there are."""


class AdditiveSampler(BaseSampler):
    """Proposes, for one cost after another, the sub-adapter believed to be the most accurate.

    An additive model is fitted to the accuracies so far (the first objective, to be maximised), and
    one to every cost (the others) unless tables are given; since all are sums over groups, the
    best choice at any cost is found exactly. Several costs are weighed anew for every proposal
    (random weights, as ParEGO draws them: Knowles 2006), each in parts of its range. What trial k
    proposes is a function of the seed, k and the finished trials. Begin with some enqueued ones
    that cover the space.
    """

    def __init__(
        self,
        space: CandidateSpace,
        *,
        examples: int,
        room: float | None = None,
        tables: Sequence[Table | Tables] = (),
        tradeoff: bool = True,
        importance: Mapping[str, float] | None = None,
        parts: np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        """`examples` that an accuracy is the share of; `room` that a limit on the costs leaves, in
        parts of the way from the minimal to the full one; `tables` of the costs; without
        `tradeoff`, cheaper ones than the limit allows are not looked for; `importance` of groups,
        by name; `parts` of `elastic.searching.screening`, with which importances are not asked."""
        self.space = space
        self.examples = examples
        self.room = room
        self.tables = tables
        self.tradeoff = tradeoff
        self.seed = seed
        self._model = _model(space, importance, parts)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {g.name: IntDistribution(0, len(g.choices) - 1) for g in self.space}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trials = study.get_trials(deepcopy=False)
        known = {self._place(other.params) for other in trials if other.params}
        done = [other for other in trials if other.state == TrialState.COMPLETE]
        if len(done) >= 2:
            chosen = self._propose(trial.number, done, known)
            if chosen is not None:
                return {g.name: int(i) for g, i in zip(self.space, chosen, strict=True)}
        generator = generator_for(self.seed, "proposal", trial.number)
        return self.space.indices(self.space.stratified(generator))

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        raise ValueError(f"{param_name} is no group of this search space")

    def _place(self, params: Mapping[str, Any]) -> tuple[int, ...]:
        return _settled(self.space, [params.get(group.name, 0) for group in self.space])

    def _propose(
        self, number: int, done: Sequence[FrozenTrial], known: set[tuple[int, ...]]
    ) -> np.ndarray | None:
        at = np.array([self._place(trial.params) for trial in done])
        accuracies = np.array([trial.values[0] for trial in done])
        belief = self._model.fit(at, accuracies, sampling_variance(accuracies, self.examples))
        generator = np.random.default_rng([self.seed, number])
        costs = self._costs(done, generator)
        low = least(costs)
        most = 0.0 if self.room is None else min(0.0, (1 - self.room) * low)
        low = min(low, most)
        for attempt in range(ATTEMPTS):
            drawn = belief.sample(generator)
            effects = belief.effects + (attempt + 1) * BOLDNESS * (drawn - belief.effects)
            # Every second one is the best at the limit itself, which is what was asked for.
            at_limit = not self.tradeoff or (self.room is not None and number % 2 == 1)
            part = ((attempt / ATTEMPTS + (0 if at_limit else number)) * GOLDEN) % 1
            # Nothing gets better by being cut; what seems to is noise.
            chosen = self._best(np.minimum(effects, 0), costs, most - part * (most - low))
            if tuple(chosen) not in known:
                return chosen
        near = _neighbour(self.space, chosen, costs, most, known, generator)
        if near is None:  # all that the limit allows are known
            near = _neighbour(self.space, chosen, costs, np.inf, known, generator)
        return near

    def _best(
        self, gains: np.ndarray, alternatives: Sequence[np.ndarray], budget: float
    ) -> np.ndarray:
        """`cheapest` of every alternative, and the best of those."""

        def value(found: tuple[np.ndarray, np.ndarray]) -> tuple[bool, float]:
            chosen, costs = found
            rows = np.arange(len(chosen))
            total = costs[rows, chosen].sum()
            fits = total <= budget + 1e-12
            return fits, gains[rows, chosen].sum() if fits else -total

        found = ((cheapest(gains, costs, budget), costs) for costs in alternatives)
        return max(found, key=value)[0]

    def _costs(
        self, done: Sequence[FrozenTrial], generator: np.random.Generator
    ) -> list[np.ndarray]:
        """(groups, choices), infinite where no choice is: all costs as one, for every precision and
        depth anew; what is left out neither gains nor costs."""
        tables = self.tables or [
            Table.fit(
                self.space,
                {
                    self.space.at(trial.params): trial.values[objective]
                    for trial in done
                    if np.isfinite(trial.values[objective])
                },
            )
            for objective in range(1, len(done[0].values))
        ]
        weights = generator.dirichlet(np.ones(len(tables))) if len(tables) > 1 else [1.0]
        apart = [list(table.alternatives()) for table in tables]
        scales = [w / max(-least(own), 1e-12) for w, own in zip(weights, apart, strict=True)]
        return [
            sum(scale * effects for scale, effects in zip(scales, each, strict=True))
            for each in zip(*apart, strict=True)
        ]


def _settled(space: Space[Any], at: Sequence[int] | np.ndarray) -> tuple[int, ...]:
    """Indices into each group's choices, 0 where the block does not run."""
    if not space.depths:
        return tuple(at)
    names = [group.name for group in space]
    gone = space.gone(dict(zip(names, at, strict=True)))
    return tuple(0 if name in gone else i for name, i in zip(names, at, strict=True))


def _neighbour(
    space: Space[Any],
    chosen: np.ndarray,
    alternatives: Sequence[np.ndarray],
    most: float,
    known: set[tuple[int, ...]],
    generator: np.random.Generator,
) -> np.ndarray | None:
    """A sub-adapter a few steps away that is not known, and costs no more than `most` if `chosen`
    does not; None after many steps."""
    rows = np.arange(len(chosen))

    def cost(at: np.ndarray) -> float:
        return min(float(costs[rows, at].sum()) for costs in alternatives)

    most = max(most, cost(chosen))
    for _ in range(20 * len(chosen)):
        group = generator.integers(len(chosen))
        moved = chosen.copy()
        moved[group] = generator.integers(len(space.groups[group].choices))
        moved = np.array(list(_settled(space, moved)))
        if cost(moved) <= most + 1e-12:
            chosen = moved
        if tuple(chosen) not in known:
            return chosen
    return None


def sampling_variance(accuracies: np.ndarray, examples: int) -> float:
    """Of one accuracy, as the share of so many examples drawn at random."""
    mean = float(np.clip(accuracies.mean(), 0.01, 0.99))
    return mean * (1 - mean) / examples


def learn(
    space: Space[Point],
    measured: Mapping[Point, float],
    examples: int,
    importance: Mapping[str, float] | None = None,
    parts: np.ndarray | None = None,
) -> Posterior | Belief:
    """What these accuracies, shares of so many examples, say of every choice, and (`fitted`) what
    they are less their noise: a front chosen by raw accuracies is a front of lucky ones."""
    values = np.array(list(measured.values()))
    model = _model(space, importance, parts)
    return model.fit(places(space, list(measured)), values, sampling_variance(values, examples))


@dataclass(frozen=True)
class Foresight:
    """How good a model's predictions were, of sub-adapters not evaluated yet."""

    r2: float
    """Of the variance the part that was predicted; negative where the mean is better."""
    rank_correlation: float | None
    n: int

    def __str__(self) -> str:
        ranks = self.rank_correlation
        order = "" if ranks is None else f", rank correlation {ranks:.2f}"
        return f"R² {self.r2:.2f}{order}"


def foresight(
    space: Space[Point],
    measured: Mapping[Point, float],
    examples: int,
    importance: Mapping[str, float] | None = None,
    parts: np.ndarray | None = None,
) -> Foresight | None:
    """Of the accuracies, in the order in which they were measured: each is predicted from those
    before the last `milestone`. None of fewer than `FORESEEN`."""
    at, values = places(space, list(measured)), np.array(list(measured.values()))
    predicted: list[float] = []
    known = BEGIN
    while known < len(values):
        model = _model(space, importance, parts)
        belief = model.fit(at[:known], values[:known], sampling_variance(values[:known], examples))
        end = min(len(values), known + max(1, known // 8))
        predicted += belief.predict(at[known:end]).tolist()
        known = end
    seen = values[BEGIN:]
    if len(seen) < FORESEEN or np.ptp(seen) == 0:
        return None
    r2 = 1 - np.square(seen - predicted).sum() / np.square(seen - seen.mean()).sum()
    return Foresight(float(r2), spearman(np.array(predicted), seen), len(seen))


def _model(
    space: Space[Any], importance: Mapping[str, float] | None, parts: np.ndarray | None
) -> Additive | Joint:
    if parts is not None:
        return Joint(kinds(space), parts)
    weights = [max(importance[group.name], 1e-12) for group in space] if importance else None
    return Additive(kinds(space), shares(space), weights)
