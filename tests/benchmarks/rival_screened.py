"""Ours with a second measure: what every choice alone diverges, made a sum that holds."""

from __future__ import annotations

import numpy as np

from elastic.latency.additive import cheapest
from tests.benchmarks.rival_puzzle import singles
from tests.benchmarks.worlds import Row, World

POWERS = np.linspace(0.3, 1.5, 25)


def screened(world: World, seed: int) -> list[Row]:
    """Divergences do not add up, powers of them do: the power is the one with which those of
    single groups sum to those of the ladder's rungs."""
    rungs = [row for row in world.ladder() if any(row)]
    together = np.array([world.divergence(row) for row in rungs])
    alone = np.maximum.accumulate(singles(world), 1)
    at = np.array(rungs)
    parts = np.take_along_axis(alone, at.T, 1).T  # (rungs, groups)
    wrong = [
        np.square(np.log((parts**power).sum(1)) / power - np.log(together)).mean()
        for power in POWERS
    ]
    lost = alone ** POWERS[int(np.argmin(wrong))]
    gains = -np.where(np.isfinite(lost), lost, 0)
    costs = world.table.effects
    return [
        tuple(map(int, cheapest(gains, costs, budget - world.table.full)))
        for budget in world.budgets(world.members)
    ]
