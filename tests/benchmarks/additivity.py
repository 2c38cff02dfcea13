"""Whether a sum is enough: what interactions would be worth to a search that knew them.

    python -m tests.benchmarks.additivity [--seeds 6] [--save]

In the simulated spaces neighbouring layers, and the groups of one layer, hurt each other. Rows:
`interactions known`, the best eight of a near-ideal front; `sum alone known`, the eight that are
best by the true losses of single groups, interactions left out; both in percent of the near-ideal
hypervolume. The first less the second is the most that any term of interaction could bring. Then
how well the two models of the search predict accuracies before they are measured, after 50.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import optuna

from elastic.latency.additive import cheapest
from elastic.searching import screening
from elastic.searching.sampler import AdditiveSampler, foresight
from tests.benchmarks.common import report
from tests.benchmarks.rival_samplers import measured_by
from tests.benchmarks.rivals import UNIT, Noisy, share_of
from tests.benchmarks.simulated import EXAMPLES, KINDS, Simulated
from tests.benchmarks.worlds import interval


def sum_alone(world: Noisy) -> list:
    """The best by what single groups lose, at eight costs."""
    gains = np.zeros(world.table.effects.shape)
    for row, loss in zip(gains, world.truth.loss, strict=True):
        row[: len(loss)] = -loss
    budgets = world.budgets(world.members)
    costs = world.table.effects
    return [tuple(map(int, cheapest(gains, costs, each - world.table.full))) for each in budgets]


def best_known(world: Noisy, front: list[tuple[float, float]], ideal: float) -> float:
    """The hypervolume of a near-ideal front at the same eight costs."""
    points = []
    for budget in world.budgets(world.members):
        within = [point for point in front if point[0] <= budget + 1e-9]
        points.append(max(within or [min(front)], key=lambda point: point[1]))
    return 100 * world.truth.volume(points) / ideal


def foreseen(world: Noisy, seed: int, *, screened: bool) -> tuple[float, float]:
    """R² and rank correlation of predictions within a search of one unit of accuracies."""
    space, parts = world.space, None
    world.begin(np.inf)
    if screened:
        found = screening.screen(
            space, lambda sub: world.divergence(space.indices(sub).values(), 130), quiet=True
        )
        parts = screening.parts(found)
    world.begin(UNIT * EXAMPLES)
    prior = {"parts": parts} if screened else {"importance": world.importances()}
    sampler = AdditiveSampler(space, examples=EXAMPLES, tables=[world.table], seed=seed, **prior)
    starts = [world.maximal, world.minimal] if screened else world.ladder()
    measured = measured_by(world, f"{screened}", sampler, starts)
    names = [group.name for group in space]
    shares = {space.at(dict(zip(names, row, strict=True))): y for row, y in measured.items()}
    told = foresight(space, shares, EXAMPLES, **prior)
    assert told is not None and told.rank_correlation is not None
    return told.r2, told.rank_correlation


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    rows: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        worlds = [Noisy(Simulated(kind, seed), seed) for seed in range(given.seeds)]
        fronts = [world.truth.near_ideal() for world in worlds]
        ideals = [w.truth.volume(front) for w, front in zip(worlds, fronts, strict=True)]
        known = [best_known(w, f, i) for w, f, i in zip(worlds, fronts, ideals, strict=True)]
        alone = [share_of(w.truth, sum_alone(w), i) for w, i in zip(worlds, ideals, strict=True)]
        for name, values in (("interactions known", known), ("sum alone known", alone)):
            mean, half = interval(values)
            rows[f"{kind}: {name}"] = {"hypervolume": mean, "±": half}
        for name, screened in (("additive model", False), ("joint model", True)):
            told = [foreseen(world, s, screened=screened) for s, world in enumerate(worlds)]
            (r2, half), (ranks, wide) = map(interval, zip(*told, strict=True))
            rows[f"{kind}: {name}"] = {"R²": r2, "±": half, "ranks": ranks, "± ranks": wide}
        print({k: v for k, v in rows.items() if k.startswith(kind)}, flush=True)
    report(
        "additivity",
        "what interactions are worth, and accuracies predicted before they are measured: means of "
        f"{given.seeds} seeds and 95 % intervals",
        rows, save=given.save,
    )  # fmt: skip


if __name__ == "__main__":
    main()
