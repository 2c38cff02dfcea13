"""Our search beside the state of the art, on simulated spaces where the truth is known.

    python -m tests.benchmarks.rivals [--seeds 6] [--units 0.25,1,2,4] [--only NAME] [--save]

The spaces of `tests.benchmarks.simulated`, with a second measure: the divergence from the full
model. Everybody has the same additive table of latencies and may score as many examples: a unit is
50 accuracies of 1,000. A figure is the hypervolume of the sub-adapters that a user would select,
eight at most, at their true accuracies, in percent of a near-ideal front's.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import optuna

from elastic.latency.cost_table import Table
from tests.benchmarks.common import report
from tests.benchmarks.rival_evopress import evopress
from tests.benchmarks.rival_puzzle import puzzle
from tests.benchmarks.rival_samplers import additive, nsga2, tpe
from tests.benchmarks.rival_screened import screened
from tests.benchmarks.simulated import EXAMPLES, KINDS, NOISE, Simulated
from tests.benchmarks.worlds import Row, World, interval

Rival = Callable[[World, int], list[Row]]
RIVALS: dict[str, Rival] = {
    "puzzle": puzzle,
    "evopress": evopress,
    "nsga2": nsga2,
    "tpe": tpe,
    "additive": additive,
    "screened": screened,
}
UNIT = 50
"""Accuracies."""
SLOW = {"tpe": 1.0}
"""Units that are not gone past: proposals that take longer than seconds each."""
SHAKEN = 1.8
"""Standard deviation of the logarithm of a divergence on one row, as far as it differs from one
sub-adapter to the next on the same rows: on SmolLM2 (arithmetic) 1.6 for sub-adapters that diverge
by 0.02 nats or more, 2.1 for all."""


class Noisy(World):
    """A simulated one, measured on examples and rows."""

    examples, rows, most_rows, gradients = EXAMPLES, 32, 400, 192

    def __init__(self, truth: Simulated, seed: int) -> None:
        super().__init__()
        self.truth, self.space, self.seed = truth, truth.space, seed
        most = max(map(len, truth.cost))
        effects = np.full((len(truth.cost), most), np.inf)
        for row, cost in zip(effects, truth.cost, strict=True):
            row[: len(cost)] = cost - cost[0]
        full = truth.latency(np.zeros(len(truth.cost), dtype=int))
        self.table = Table(truth.space, full, effects)

    def scored(self, row: Row) -> float:
        return (self.truth.accuracy(np.array(row)) + NOISE * self._drawn(row, 0)) / 100

    def diverged(self, row: Row, rows: int, draw: int) -> float:
        shaken = SHAKEN / np.sqrt(rows) * self._drawn(row, 1 + draw)
        return self.truth.divergence(np.array(row)) * float(np.exp(shaken))

    def importance(self) -> Mapping[str, float]:
        return self.truth.importance

    def _drawn(self, row: Row, number: int) -> float:
        return float(np.random.default_rng([self.seed, number, *row]).normal())


def share_of(truth: Simulated, rows: list[Row], ideal: float) -> float:
    points = [(truth.latency(at), truth.accuracy(at)) for at in map(np.array, rows)]
    return float(100 * truth.volume(points) / ideal)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--units", default="0.25,1,2,4")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of rivals")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    units = [float(each) for each in given.units.split(",")]
    asked = {n: r for n, r in RIVALS.items() if not given.only or any(o in n for o in given.only)}
    rows: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        truths = [Simulated(kind, seed) for seed in range(given.seeds)]
        fronts = [truth.near_ideal() for truth in truths]
        ideals = [truth.volume(front) for truth, front in zip(truths, fronts, strict=True)]
        for name, rival in asked.items():
            began, line = time.perf_counter(), {}
            most = SLOW.get(name, max(units))
            found: dict[float, list[float]] = {unit: [] for unit in units if unit <= most}
            for seed, (truth, ideal) in enumerate(zip(truths, ideals, strict=True)):
                world = Noisy(truth, seed)
                for unit in found:
                    world.begin(unit * UNIT * EXAMPLES)
                    found[unit].append(share_of(truth, rival(world, seed), ideal))
            for unit in found:
                line[f"{unit:g}"], line[f"± {unit:g}"] = interval(found[unit])
            line["seconds"] = (time.perf_counter() - began) / len(truths)
            rows[f"{kind}: {name}"] = line
            print(f"{kind}: {name}", {k: round(v, 1) for k, v in line.items()}, flush=True)
    report(
        "rivals",
        f"hypervolume in percent of near-ideal after so many units of {UNIT} accuracies of "
        f"{EXAMPLES} examples, mean of {given.seeds} seeds and 95 % interval",
        rows,
        save=given.save,
    )


if __name__ == "__main__":
    main()
