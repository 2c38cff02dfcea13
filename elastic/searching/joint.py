"""Accuracies and divergences in one model: what screening found, corrected by few accuracies.

    accuracy(x) = a - b · S(x)^q,    S(x) = Σ over groups of part[group, choice] · (1 + δ)

with the parts of `elastic.searching.screening`, which sum to 1 at everything's smallest. A
divergence is much less noisy than an accuracy, but what makes answers differ need not make them
wrong: δ, one for each kind of group and one for each group, is what accuracies say beside it. A
Gaussian process, linear in δ around 0; q, the spread of δ and the noise are those of the largest
restricted likelihood. Numpy only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elastic.latency.additive import milestone

POWERS = (0.8, 1.2, 1.8)
"""Of the sum, which accuracy falls with."""
SPREADS = (0.1, 0.2, 0.4)
"""Of δ."""
NOISES = (0.3, 1.0, 4.0, 16.0)
"""Variance that is left unexplained, in parts of that of as many examples drawn anew: less than 1
where all are of the same examples; more where something is real that the model cannot say, such as
a gain by being cut."""
LEAST = 0.1
"""Of 1 + δ: nothing is believed to gain by being cut."""
LEAST_LOSS = 0.5
"""Of b, in standard errors of one accuracy. Accuracies of few examples may rise by chance as more
is cut; then they cannot tell a small loss from none, and the order of the divergences decides."""
CHANCE = 3.0
"""Of a rise, -b, in standard errors of one accuracy: what may still be chance. All accuracies are
of the same examples, so that more of them do not tell chance from truth."""


@dataclass(frozen=True)
class Belief:
    """What is believed after the evaluations."""

    effects: np.ndarray
    """(groups, choices): the parts as they are believed now, in shares of examples, at most 0; they
    sum to what is lost at everything's smallest."""
    fitted: np.ndarray
    """(evaluations,): accuracies less their noise."""
    spread: float
    """Of δ: how much accuracies say beside divergences."""
    at: tuple[float, float, float]
    """a, b and q."""
    _model: Joint
    _parts: np.ndarray
    _slopes: np.ndarray
    _weigh: np.ndarray
    _noise: float
    trust: float | None = None
    """Importances play no part."""

    def predict(self, choices: np.ndarray) -> np.ndarray:
        """(points,) accuracies at (points, groups) indices."""
        a, b, power = self.at
        values: np.ndarray = a - b * _chosen(self._parts, choices).sum(1) ** power
        return values

    def sample(self, generator: np.random.Generator) -> np.ndarray:
        """Effects drawn from the belief, (groups, choices): Matheron's rule."""
        drawn = generator.normal(size=self._slopes.shape[1]) * self.spread
        noise = generator.normal(size=len(self._slopes)) * np.sqrt(self._noise)
        left = self._weigh @ (self._slopes @ drawn + noise)
        return self._model.effects(
            self._parts, drawn - self.spread**2 * self._slopes.T @ left, self.at
        )


class Joint:
    """Groups by kind, with what each of their choices adds to the sum."""

    def __init__(self, kinds: Sequence[str], parts: np.ndarray) -> None:
        """`parts` (groups, choices) are not negative, 0 at full size, and not all 0."""
        names = list(dict.fromkeys(kinds))
        self._of_kind = np.array([[kind == name for name in names] for kind in kinds], dtype=float)
        self._parts = parts / parts.max(1).sum()
        self._tuned: dict[int, tuple[float, float, float]] = {}

    def fit(self, choices: np.ndarray, values: np.ndarray, noise: float) -> Belief:
        """Of (evaluations, groups) indices, their accuracies (evaluations,), and the variance of
        one."""
        known = milestone(len(values))
        if known not in self._tuned:
            self._tuned[known] = self._tune(choices[:known], values[:known], noise)
        power, spread, left = self._tuned[known]
        mean, slopes, _ = self._linear(choices, values, power, noise)
        # Of what a and b leave, which are as free as without a prior.
        inverse = np.linalg.inv(left * np.eye(len(values)) + spread**2 * slopes @ slopes.T)
        covariance = np.linalg.pinv(mean.T @ inverse @ mean)
        b, rest = float((covariance @ mean.T @ inverse @ values)[1]), values
        if b < _least(noise):
            b, (rest, mean) = _least(noise), _held(mean, values, noise)
            covariance = np.linalg.pinv(mean.T @ inverse @ mean)
        weigh = inverse - inverse @ mean @ covariance @ mean.T @ inverse
        asked = weigh @ rest
        fitted = values - min(left, noise) * asked
        delta = spread**2 * slopes.T @ asked
        parts = self._moved(self._parts, delta)
        a = float((fitted + b * _chosen(parts, choices).sum(1) ** power).mean())
        at = a, b, power
        effects = self.effects(parts, np.zeros_like(delta), at)
        return Belief(effects, fitted, spread, at, self, parts, slopes, weigh, left)

    def effects(
        self, parts: np.ndarray, delta: np.ndarray, at: tuple[float, float, float]
    ) -> np.ndarray:
        """(groups, choices) of parts that δ moves further."""
        _, b, power = at
        moved = self._moved(parts, delta)
        effects: np.ndarray = -b * parts.max(1).sum() ** (power - 1) * moved
        return effects

    def _moved(self, parts: np.ndarray, delta: np.ndarray) -> np.ndarray:
        groups = len(parts)
        factor = 1 + delta[:groups] + self._of_kind @ delta[groups:]
        moved: np.ndarray = parts * np.maximum(factor, LEAST)[:, None]
        return moved

    def _linear(
        self, choices: np.ndarray, values: np.ndarray, power: float, noise: float
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Features of a and b (evaluations, 2), slopes in δ (evaluations, groups + kinds), and b
        without δ."""
        parts = _chosen(self._parts, choices)
        total = np.maximum(parts.sum(1), 1e-9)
        mean = np.stack([np.ones(len(values)), -(total**power)], 1)
        b = float(np.linalg.lstsq(mean, values, rcond=None)[0][1])
        slopes = -max(b, _least(noise)) * power * total[:, None] ** (power - 1) * parts
        return mean, np.hstack([slopes, slopes @ self._of_kind]), b

    def _tune(
        self, choices: np.ndarray, values: np.ndarray, noise: float
    ) -> tuple[float, float, float]:
        """Power, spread and noise of the largest restricted likelihood; with b as it is, unless the
        accuracies rise by more than chance: then the noise is to say what the floor of b cannot."""
        best, chosen = -np.inf, (POWERS[0], SPREADS[0], noise)
        for power in POWERS:
            mean, slopes, b = self._linear(choices, values, power, noise)
            rises = b < -CHANCE * math.sqrt(noise)
            rest, mean = _held(mean, values, noise) if rises else (values, mean)
            found, vectors = np.linalg.eigh(slopes @ slopes.T)
            turned, seen = vectors.T @ mean, vectors.T @ rest
            for spread, part in itertools.product(SPREADS, NOISES):
                weights = 1 / (part * noise + spread**2 * np.maximum(found, 0))
                among = turned.T @ (weights[:, None] * turned)
                among += 1e-12 * np.trace(among) * np.eye(len(among))  # all sums may be alike
                left = seen - turned @ np.linalg.solve(among, turned.T @ (weights * seen))
                likelihood = (np.log(weights).sum() - np.linalg.slogdet(among)[1]) / 2
                likelihood -= float(weights @ left**2) / 2
                if likelihood > best:
                    best, chosen = likelihood, (power, spread, part * noise)
        return chosen


def _least(noise: float) -> float:
    """The floor of b."""
    return LEAST_LOSS * math.sqrt(noise)


def _held(mean: np.ndarray, values: np.ndarray, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Where b is at its floor: values without what it explains, and the feature of a alone."""
    return values - _least(noise) * mean[:, 1], mean[:, :1]


def _chosen(parts: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """(points, groups) of what each point chooses."""
    return np.take_along_axis(parts, choices.T, 1).T
