"""What a search is worth after so many evaluations, on simulated spaces where the truth is known.

    python -m tests.benchmarks.simulated [--seeds 6] [--save]

Two spaces of 96 groups: LoNAS's own on LLaMA-7B (10^41.6 sub-adapters) and a richer one (4 ranks,
5 widths and 3 head counts per layer, 10^56.9). Layers differ in how much accuracy they are worth,
neighbours and blocks of one layer hurt each other, latency is a sum, and an accuracy has the noise
of 1,000 examples (0.8 points). A figure is the hypervolume of the sub-adapters that a user would
select (by accuracies as measured; `additive` by its estimates), at their true accuracies, in
percent of a near-ideal front's: the minimal accuracy and the full latency are the reference.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import optuna
from optuna import samplers

from elastic.latency.cost_table import places
from elastic.searching.pareto import hypervolume, non_dominated
from elastic.searching.sampler import AdditiveSampler, learn
from elastic.spaces.bound import BoundSpace, Group, SubAdapter, generator_for
from elastic.spaces.dims import Cut
from tests.benchmarks.common import report

LAYERS, NOISE, EXAMPLES = 32, 0.8, 1000
KINDS = {  # name: choices, share of the latency, points of accuracy that the smallest ones cost
    "lonas": {
        "attention_rank": ((32, 28), 0.03, 0.5),
        "mlp_width": ((11008, 9632, 8256, 6880, 5504), 0.6, 8.0),
        "mlp_rank": ((32, 28), 0.04, 0.5),
    },
    "richer": {
        "rank": ((32, 24, 16, 8), 0.06, 2.0),
        "mlp_width": ((11008, 9632, 8256, 6880, 5504), 0.5, 8.0),
        "heads": ((32, 24, 16), 0.22, 6.0),
    },
}
SPREAD = {"lonas": 0.7, "richer": 0.9}
"""Of the logarithm of what a layer is worth."""
ALIKE = 0.85
"""Correlation, within a kind, of the logarithms of what a group costs in accuracy and what it adds
to the divergence from the full model. On SmolLM2 (arithmetic, 24 sub-adapters of widths alone)
accuracy and the root of the divergence are correlated by -0.58 at equal mean width; here, as noisy,
by -0.3, so that divergences tell less than they do there."""
DIVERGED = 2.0
"""Nats at everything's smallest."""
CONVEX = 1.15
"""Power of the sum of what groups add: there the accuracy lost grows with the 0.88th power of the
divergence. (Single groups add up to far less than all together there, for a power of about 2, of
the accuracy too; here both are nearly sums.)"""


class Simulated:
    """A space with its true accuracy and latency."""

    def __init__(self, kind: str, seed: int, layers: int = LAYERS) -> None:
        generator = np.random.default_rng(seed)
        depth = np.linspace(0, 1, layers)
        ends = 1 + 1.5 * np.exp(-8 * depth) + 0.8 * np.exp(-8 * (1 - depth))
        apart = np.random.default_rng([seed, 1])
        groups, self.loss, self.cost, worth, self.added = [], [], [], [], []
        for name, (choices, share, points) in KINDS[kind].items():
            weights = ends * np.exp(generator.normal(0, SPREAD[kind], layers))
            weights *= points / weights.sum()
            shares = share / layers * generator.uniform(0.85, 1.15, layers)
            power = generator.uniform(1.1, 1.8)
            sizes = np.array(choices) / choices[0]
            cut = (1 - sizes) / (1 - sizes[-1])
            curve = cut**power
            adding = _like(weights, apart)
            bent = cut ** apart.uniform(1.1, 1.8)
            for layer in range(layers):
                cuts = (Cut("layer", "out"),)
                groups.append(Group(f"layers.{layer}.{name}", "width", choices, cuts))
                self.loss.append(weights[layer] * curve)
                self.added.append(adding[layer] * bent)
                self.cost.append(shares[layer] * sizes)
            worth.append(weights)
        self.space = BoundSpace(tuple(groups), ())
        self.layers = layers
        self.fixed = 1 - sum(KINDS[kind][name][1] for name in KINDS[kind])
        self.importance = self._importance(worth, generator)
        least = np.array([len(loss) - 1 for loss in self.loss])
        self.most = self._together(self.added, least)

    def _importance(self, worth, generator: np.random.Generator) -> dict[str, float]:
        """Correlated by 0.6 with the logarithm of the truth, in every kind."""
        found = []
        for weights in worth:
            logs = np.log(weights)
            logs = (logs - logs.mean()) / logs.std()
            found.append(np.exp(0.7 * (0.6 * logs + 0.8 * generator.normal(size=self.layers))))
        return dict(zip((group.name for group in self.space), np.concatenate(found), strict=True))

    def latency(self, at: np.ndarray) -> float:
        return self.fixed + float(sum(cost[i] for cost, i in zip(self.cost, at, strict=True)))

    def accuracy(self, at: np.ndarray) -> float:
        return 80 - self._together(self.loss, at)

    def divergence(self, at: np.ndarray) -> float:
        """From the full model, in nats: a sum like that of the accuracy, of other weights and
        curves, which grows faster than it."""
        return float(DIVERGED * (self._together(self.added, at) / self.most) ** CONVEX)

    def _together(self, parts: list[np.ndarray], at: np.ndarray) -> float:
        """The sum over groups of what each choice adds, and what neighbours and the groups of one
        layer add to each other."""
        lost = np.array([loss[i] for loss, i in zip(parts, at, strict=True)])
        lost = lost.reshape(-1, self.layers)
        neighbours = np.sqrt(lost[:, 1:] * lost[:, :-1]).sum()
        return float(lost.sum() + 0.3 * neighbours + 0.5 * (lost.sum(0) ** 2).sum())

    def near_ideal(self) -> list[tuple[float, float]]:
        """Latency and accuracy of local optima at 24 exchange rates, from one to the next."""
        at = np.zeros(len(self.space.groups), dtype=int)
        found = []
        for rate in np.geomspace(3, 400, 24):
            best, moved = self.accuracy(at) - rate * self.latency(at), True
            while moved:
                moved = False
                for group, loss in enumerate(self.loss):
                    for choice in range(len(loss)):
                        before = at[group]
                        at[group] = choice
                        value = self.accuracy(at) - rate * self.latency(at)
                        if value > best + 1e-9:
                            best, moved = value, True
                        else:
                            at[group] = before
            found.append((self.latency(at), self.accuracy(at)))
        return found

    def volume(self, points: list[tuple[float, float]]) -> float:
        space = self.space
        full, least = places(space, [space.maximal(), space.minimal()])
        latency, accuracy = self.latency(full), self.accuracy(least)
        return hypervolume([(ms, -right) for ms, right in points], (latency, -accuracy))


def _like(weights: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Others of the same sum whose logarithms are correlated with theirs by `ALIKE`."""
    logs = np.log(weights)
    spread = logs.std()
    noise = generator.normal(0, spread, len(weights))
    mixed = ALIKE * (logs - logs.mean()) + np.sqrt(1 - ALIKE**2) * noise
    found: np.ndarray = np.exp(mixed)
    return found * weights.sum() / found.sum()


Make = Callable[[Simulated, int], samplers.BaseSampler]


def additive(prior: bool) -> Make:
    def make(world: Simulated, seed: int) -> samplers.BaseSampler:
        importance = world.importance if prior else None
        return AdditiveSampler(world.space, examples=EXAMPLES, importance=importance, seed=seed)

    return make


def stratified(world: Simulated, seed: int) -> samplers.BaseSampler:
    """Draws of a target size first, after the ladder."""

    class Stratified(AdditiveSampler):
        def sample_relative(self, study, trial, search_space):
            generator = generator_for(seed, trial.number)
            return world.space.indices(world.space.stratified(generator))

    return Stratified(world.space, examples=EXAMPLES)


SAMPLERS: dict[str, tuple[bool, Make]] = {  # whether it starts from the ladder
    "random": (False, lambda world, seed: samplers.RandomSampler(seed=seed)),
    "NSGA-II, population 8 (LoNAS)": (
        False, lambda world, seed: samplers.NSGAIISampler(population_size=8, seed=seed),
    ),
    "NSGA-II, population 20, ladder": (
        True, lambda world, seed: samplers.NSGAIISampler(population_size=20, seed=seed),
    ),
    "TPE, ladder": (True, lambda world, seed: samplers.TPESampler(seed=seed)),
    "stratified, ladder": (True, stratified),
    "additive": (True, additive(prior=False)),
    "additive, importances of correlation 0.6": (True, additive(prior=True)),
}  # fmt: skip


def searched(
    world: Simulated, make: Make, *, ladder: bool, trials: int, seed: int
) -> tuple[dict[SubAdapter, float], list[float]]:
    """Measured accuracies of so many sub-adapters in order, and the seconds of every proposal."""
    space, generator = world.space, np.random.default_rng([seed, 1])
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=make(world, seed))
    starts = [space.maximal(), space.minimal(), *space.ladder()] if ladder else []
    for sub in dict.fromkeys(starts):
        study.enqueue_trial(space.indices(sub))
    found: dict[SubAdapter, float] = {}
    seconds = []
    while len(found) < trials and len(seconds) < 3 * trials:
        began = time.perf_counter()
        trial = study.ask()
        trial.relative_params  # noqa: B018 as in elastic.searching.study
        at = {g.name: trial.suggest_int(g.name, 0, len(g.choices) - 1) for g in space}
        seconds.append(time.perf_counter() - began)
        sub, row = space.at(at), np.array(list(at.values()))
        if sub not in found:
            found[sub] = world.accuracy(row) + NOISE * generator.normal()
        study.tell(trial, [found[sub] / 100, world.latency(row)])
    return found, seconds


def worth(world: Simulated, measured: dict[SubAdapter, float], ideal: float, *, estimate: bool):
    """Percent of the near-ideal hypervolume of what a user selects."""
    chosen = measured
    if estimate:
        shares = {sub: value / 100 for sub, value in measured.items()}
        chosen = dict(zip(shares, learn(world.space, shares, EXAMPLES).fitted, strict=True))
    subs = list(measured)
    rows = places(world.space, subs)
    times = [world.latency(row) for row in rows]
    front = non_dominated([(ms, -chosen[sub]) for ms, sub in zip(times, subs, strict=True)])
    points = [(times[i], world.accuracy(rows[i])) for i in front]
    return float(100 * world.volume(points) / ideal)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    counts, rows = (50, 100, 200), {}
    for kind in KINDS:
        worlds = [Simulated(kind, seed) for seed in range(given.seeds)]
        ideals = [world.volume(world.near_ideal()) for world in worlds]
        for name, (ladder, make) in SAMPLERS.items():
            each = {count: [] for count in counts}
            for seed, (world, ideal) in enumerate(zip(worlds, ideals, strict=True)):
                found, _ = searched(world, make, ladder=ladder, trials=max(counts), seed=seed)
                for count in counts:
                    some = dict(list(found.items())[:count])
                    estimate = name.startswith("additive")
                    each[count].append(worth(world, some, ideal, estimate=estimate))
            rows[f"{kind}: {name}"] = {
                **{f"after {count}": statistics.mean(each[count]) for count in counts},
                "least after 50": min(each[50]),
            }
            print(f"{kind}: {name}", flush=True)
    for layers in (LAYERS, 334):
        world = Simulated("lonas", 0, layers)
        _, seconds = searched(world, additive(prior=True), ladder=True, trials=50, seed=0)
        proposing = [1e3 * each for each in seconds[5:]]
        rows[f"proposing, {3 * layers} groups"] = {
            "median_ms": statistics.median(proposing), "most_ms": max(proposing)
        }  # fmt: skip
    report(
        "simulated",
        f"hypervolume in percent of near-ideal, mean of {given.seeds} seeds",
        rows,
        save=given.save,
    )


if __name__ == "__main__":
    main()
