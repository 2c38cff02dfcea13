"""An additive model of what every choice costs, learnt from few evaluations. Numpy only.

y(x) = y₀ + Σ over groups of effect[group, choice]. With tens of evaluations and hundreds of choices
nothing is learnt of each alone, so groups of one kind share a curve over their sizes, and a group
departs from it only as far as the data ask. All of it is one Gaussian model: a ridge regression
whose penalties (how much kinds matter, how much groups differ, how noisy evaluations are, how far
to trust the importances) are those of the largest marginal likelihood.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DEPARTURES = (0.1, 0.3, 1.0)
"""Spread of a group's effect around its kind's, in parts of the kind's."""
SIZES = (0.5, 1.0, 2.0, 4.0)
"""Effect of cutting all groups of a kind, in standard deviations of y."""
NOISES = (0.1, 0.5, 1.0, 2.0)
"""Variance that the model leaves unexplained, in parts of the evaluations' own: less than 1 where
their errors are alike, as on the same examples."""
MISFITS = (0.003, 0.01, 0.03, 0.1, 0.3)
"""The same in parts of the variance of y, for what is real but no sum."""
TRUSTS = (0.0, 0.5, 1.0)
"""Exponents of the importances; 0 ignores them."""


@dataclass(frozen=True)
class Posterior:
    """What is believed after the evaluations."""

    effects: np.ndarray
    """(groups, choices): the mean effect of every choice, 0 at full size, 0 where there is none."""
    fitted: np.ndarray
    """(evaluations,): the true values at the evaluated points, as far as they can be known: the
    model's, and the part of their residuals that is not noise."""
    trust: float
    """The exponent of the importances that explains the evaluations best."""
    offset: float
    """The value at full size; with the effects of its choices, that of any other point."""
    _model: Additive
    _basis: np.ndarray
    _residual: np.ndarray
    _solve: tuple[np.ndarray, np.ndarray]
    _spread: np.ndarray
    _noise: float

    def predict(self, choices: np.ndarray) -> np.ndarray:
        """(points,) values at (points, groups) indices."""
        added: np.ndarray = np.take_along_axis(self.effects, choices.T, 1).sum(0)
        return self.offset + added

    def sample(self, generator: np.random.Generator) -> np.ndarray:
        """Effects drawn from the belief, (groups, choices): Matheron's rule."""
        weights = generator.normal(size=len(self._spread)) * self._spread
        noise = generator.normal(size=len(self._residual)) * np.sqrt(self._noise)
        left = self._residual - (self._basis @ weights + noise)
        vectors, inverse = self._solve
        weights += self._spread**2 * (self._basis.T @ (vectors @ (inverse * (vectors.T @ left))))
        return self._model.effects(weights, self.trust)


class Additive:
    """Groups by kind, with the sizes of their choices and perhaps their importances."""

    def __init__(
        self,
        kinds: Sequence[str],
        sizes: Sequence[Sequence[float]],
        importance: Sequence[float] | None = None,
    ) -> None:
        """`sizes` descend from the full one; `importance` is positive, larger is more important,
        compared within a kind."""
        names = list(dict.fromkeys(kinds))
        self._kind = np.array([names.index(kind) for kind in kinds])
        self._kinds = len(names)
        self._count = np.bincount(self._kind)[self._kind]
        most = max(map(len, sizes))
        self._cut = np.zeros((len(sizes), most))
        """How much of what can be cut is cut, from 0 to 1, by group and choice."""
        for row, own in zip(self._cut, sizes, strict=True):
            span = max(own[0] - own[-1], 1e-12)
            row[: len(own)] = [(own[0] - size) / span for size in own]
        self._importance = np.ones(len(sizes)) if importance is None else np.asarray(importance)
        self._trusts = TRUSTS if importance is not None else (0.0,)
        self._tuned: dict[int, tuple[float, float, float, float]] = {}

    def fit(self, choices: np.ndarray, values: np.ndarray, noise: float) -> Posterior:
        """Of (evaluations, groups) indices, their (evaluations,) values, and the variance of one
        evaluation."""
        mean = values.mean()
        residual = values - mean
        known = milestone(len(values))
        if known not in self._tuned:
            self._tuned[known] = self._tune(choices[:known], values[:known], noise)
        trust, departure, size, left = self._tuned[known]
        basis, kind = self._basis(choices, trust)
        middle = basis.mean(0)
        basis = basis - middle
        spread = np.where(kind, size, size * departure) * max(values.std(), 1e-12)
        found, vectors = np.linalg.eigh((basis * spread**2) @ basis.T)
        inverse = 1 / (np.maximum(found, 0) + left)
        weights = spread**2 * (basis.T @ (vectors @ (inverse * (vectors.T @ residual))))
        additive = mean + basis @ weights
        real = max(0.0, 1 - noise / left)
        return Posterior(
            effects=self.effects(weights, trust),
            fitted=additive + real * (values - additive),
            trust=trust,
            offset=mean - middle @ weights,
            _model=self,
            _basis=basis,
            _residual=residual,
            _solve=(vectors, inverse),
            _spread=spread,
            _noise=left,
        )

    def effects(self, weights: np.ndarray, trust: float) -> np.ndarray:
        """(groups, choices) of what each choice adds."""
        groups, most = self._cut.shape
        scale = self._scale(trust)[:, None]
        line, curve, steps, own_line, own_curve = np.split(
            weights,
            np.cumsum([self._kinds, self._kinds, self._kinds * most, groups]),
        )
        shared = 2 * line[self._kind][:, None] * self._cut
        shared += 2 * curve[self._kind][:, None] * self._cut**2
        shared += 0.5 * steps.reshape(self._kinds, most)[self._kind] * (self._cut > 0)
        own = 2 * own_line[:, None] * self._cut + own_curve[:, None] * self._cut**2
        effects: np.ndarray = scale * (shared + own)
        return effects

    def _scale(self, trust: float) -> np.ndarray:
        """Every group's share of its kind's effect: 1 / groups of the kind on average."""
        powers = self._importance**trust
        means = np.bincount(self._kind, powers) / np.bincount(self._kind)
        scale: np.ndarray = powers / means[self._kind] / self._count
        return scale

    def _basis(self, choices: np.ndarray, trust: float) -> tuple[np.ndarray, np.ndarray]:
        """Features (evaluations, weights) and which of them belong to kinds."""
        points, most = len(choices), self._cut.shape[1]
        cut = np.take_along_axis(self._cut, choices.T, 1).T * self._scale(trust)
        curved = np.take_along_axis(self._cut**2, choices.T, 1).T * self._scale(trust)
        of_kind = np.eye(self._kinds)[self._kind]
        steps = np.zeros((points, self._kinds, most))
        rows = np.arange(points)[:, None]
        shares = np.broadcast_to(self._scale(trust), choices.shape) * (cut > 0)
        np.add.at(steps, (rows, self._kind[None], choices), shares)
        shared = [2 * cut @ of_kind, 2 * curved @ of_kind, 0.5 * steps.reshape(points, -1)]
        basis = np.hstack([*shared, 2 * cut, curved])
        kind = np.arange(basis.shape[1]) < sum(part.shape[1] for part in shared)
        return basis, kind

    def _tune(
        self, choices: np.ndarray, values: np.ndarray, noise: float
    ) -> tuple[float, float, float, float]:
        """Trust, departure, size and unexplained variance of the largest marginal likelihood."""
        spread = max(values.std(), 1e-12)
        residual = values - values.mean()
        misfits = [part * noise for part in NOISES] + [part * spread**2 for part in MISFITS]
        grid = itertools.product(SIZES, misfits)
        sizes, left = (np.array(values) for values in zip(*grid, strict=True))
        best, chosen = -np.inf, (0.0, DEPARTURES[0], SIZES[0], noise)
        for trust in self._trusts:
            basis, kind = self._basis(choices, trust)
            basis = basis - basis.mean(0)
            shared, own = (basis[:, part] @ basis[:, part].T for part in (kind, ~kind))
            for departure in DEPARTURES:
                found, vectors = np.linalg.eigh(shared + departure**2 * own)
                found, seen = np.maximum(found, 0), vectors.T @ residual
                total = np.outer((sizes * spread) ** 2, found) + left[:, None]
                # Without the mean's, which was taken out: one of those of which nothing is known,
                # and which of these it is depends on rounding.
                likelihood = (np.log(left) - (np.log(total) + seen**2 / total).sum(1)) / 2
                at = int(likelihood.argmax())
                if likelihood[at] > best:
                    best = likelihood[at]
                    chosen = (trust, departure, float(sizes[at]), float(left[at]))
        return chosen


def milestone(count: int) -> int:
    """The numbers of evaluations at which penalties are chosen anew, an eighth apart: a function
    of the evaluations alone, so a resumed search believes the same."""
    known = min(count, 8)
    while known + max(1, known // 8) <= count:
        known += max(1, known // 8)
    return known


def cheapest(gains: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """The choices (groups,) of the largest sum of `gains` whose `costs` sum to at most `budget`,
    both (groups, choices) with infinite cost where there is no choice.

    On the Lagrangian front: each group maximises gain - λ · cost, for the smallest λ that fits; the
    cheapest of all if nothing does.
    """

    def at(price: float) -> np.ndarray:
        return np.asarray(np.argmax(gains - price * costs, 1))

    def total(chosen: np.ndarray) -> float:
        return float(np.take_along_axis(costs, chosen[:, None], 1).sum())

    chosen: np.ndarray = np.argmax(np.where(np.isinf(costs), -np.inf, gains), 1)
    if total(chosen) <= budget:
        return chosen
    low, high = 0.0, float(np.ptp(gains) / max(np.ptp(costs[np.isfinite(costs)]), 1e-12)) + 1e-12
    for _ in range(60):
        if total(at(high)) <= budget:
            break
        low, high = high, 4 * high
    else:
        return np.asarray(np.argmin(costs, 1))
    for _ in range(40):
        middle = (low + high) / 2
        if total(at(middle)) > budget:
            low = middle
        else:
            high = middle
    return at(high)
