"""Searches by Optuna's interface, each after the ladder: NSGA-II as LoNAS runs it (a population of
eight, chosen by raw accuracies), TPE, and our additive model without a second measure."""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna import samplers

from elastic.searching.sampler import AdditiveSampler, learn
from tests.benchmarks.worlds import Row, Spent, World, selected


def nsga2(world: World, seed: int) -> list[Row]:
    sampler = samplers.NSGAIISampler(population_size=8, seed=seed)
    return selected(world, measured_by(world, f"nsga2 {seed}", sampler, world.ladder()))


def tpe(world: World, seed: int) -> list[Row]:
    sampler = samplers.TPESampler(seed=seed, n_startup_trials=12)
    return selected(world, measured_by(world, f"tpe {seed}", sampler, world.ladder()))


def additive(world: World, seed: int) -> list[Row]:
    """`sampler: additive` with `screen: 0`."""
    importance = world.importances()
    sampler = AdditiveSampler(
        world.space, examples=world.examples, tables=[world.table], importance=importance, seed=seed
    )
    measured = measured_by(world, f"additive {seed}", sampler, world.ladder())
    names = [group.name for group in world.space]
    shares = {
        world.space.at(dict(zip(names, row, strict=True))): share for row, share in measured.items()
    }
    belief = learn(world.space, shares, world.examples, importance)
    return selected(world, dict(zip(measured, belief.fitted.tolist(), strict=True)))


def measured_by(
    world: World, name: str, sampler: samplers.BaseSampler, starts: Sequence[Row]
) -> dict[Row, float]:
    """Accuracies until nothing is left to spend, in order; one of a smaller budget goes on."""
    if name not in world.kept:
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        for row in starts:
            study.enqueue_trial({g.name: at for g, at in zip(world.space, row, strict=True)})
        world.kept[name] = study, {}, []
    study, found, waiting = world.kept[name]
    for row in found:
        world.accuracy(row)  # paid for anew
    repeats = 0
    while repeats < 200:
        trial = waiting.pop() if waiting else study.ask()
        trial.relative_params  # noqa: B018 as in elastic.searching.study
        at = {g.name: trial.suggest_int(g.name, 0, len(g.choices) - 1) for g in world.space}
        row = tuple(at.values())
        repeats = repeats + 1 if row in found else 0
        try:
            found[row] = world.accuracy(row)
        except Spent:
            waiting.append(trial)
            break
        study.tell(trial, [found[row], world.cost(row)])
    return dict(found)
