"""Puzzle's way (Bercovich et al. 2024, arXiv 2411.19146): every choice of every group is scored
alone, all others full; what a sub-adapter loses is taken for the sum; a mixed-integer programme
finds the one that loses least at a cost. Its score is the KL divergence from the full model."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from tests.benchmarks.worlds import Row, World


def puzzle(world: World, seed: int) -> list[Row]:
    """One for each of `world.members` costs. All that may be spent goes into the scores, as rows;
    a programme costs nothing."""
    lost = singles(world)
    return [exact(lost, world.table.effects, budget - world.table.full)
            for budget in world.budgets(world.members)]  # fmt: skip


def singles(world: World) -> np.ndarray:
    """(groups, choices): what each choice alone diverges; infinite where there is none."""
    count = sum(len(group.choices) - 1 for group in world.space)
    rows = max(1, min(world.most_rows, int(world.left // count)))
    lost = np.full(world.table.effects.shape, np.inf)
    lost[:, 0] = 0
    for place, group in enumerate(world.space):
        for choice in range(1, len(group.choices)):
            at = list(world.maximal)
            at[place] = choice
            lost[place, choice] = world.divergence(at, rows)
    return lost


def exact(lost: np.ndarray, costs: np.ndarray, budget: float) -> Row:
    """The choices whose losses (groups, choices) sum to the least and whose costs to at most
    `budget`: HiGHS. The cheapest where none does."""
    groups, most = lost.shape
    there = np.isfinite(lost) & np.isfinite(costs)
    cheapest = np.where(there, costs, np.inf).argmin(1)
    budget = max(budget, costs[np.arange(groups), cheapest].sum())
    one_each = np.kron(np.eye(groups), np.ones(most))
    weight = np.where(there, costs, 0).ravel()
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(weight, -np.inf, budget + 1e-9)]
    found = milp(
        np.where(there, lost, 0).ravel(), integrality=np.ones(lost.size), constraints=limits,
        bounds=Bounds(0, there.ravel().astype(float)),
        options={"mip_rel_gap": 1e-3, "time_limit": 20},
    )  # fmt: skip
    if found.x is None:
        return tuple(map(int, cheapest))
    return tuple(map(int, found.x.reshape(lost.shape).argmax(1)))
