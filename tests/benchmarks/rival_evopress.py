"""EvoPress (Sieberling et al. 2024, arXiv 2410.14649): evolution at one cost after another.

From one parent come offspring that move some groups a level up and as many others down, so that
the cost stays. Selection goes in steps: all are compared on few rows, the best of them on more, the
last few and the parent on most, and the best is the next parent.
"""

from __future__ import annotations

import itertools

import numpy as np

from tests.benchmarks.worlds import Row, Spent, World

OFFSPRING = 16
STEPS = ((4, 0.25), (2, 0.5), (1, 1.0))
"""How many survive a step, and the part of `world.rows` it asks; theirs are 16 of 128, 4 and 1, on
ever eight times the tokens, over 150 generations, for which there is no room here."""
TRIES = 200


def evopress(world: World, seed: int) -> list[Row]:
    """The last parent at each of the costs, which share what may be spent."""
    generator = np.random.default_rng([seed, 7])
    budgets, whole = world.budgets(world.members), world.left
    found = []
    for number, budget in enumerate(budgets, 1):
        parent = _start(world, budget, generator)
        for generation in itertools.count():
            if world.spent >= whole * number / len(budgets):
                break
            young = _offspring(world, parent, budget, generator)
            if not young:
                break
            try:
                parent = _select(world, parent, young, 1 + generation * len(STEPS))
            except Spent:
                break
        found.append(parent)
    return found


def _select(world: World, parent: Row, young: list[Row], draw: int) -> Row:
    for step, (survivors, part) in enumerate(STEPS):
        if survivors == 1 and parent not in young:
            young = [*young, parent]
        rows = max(1, round(part * world.rows))
        losses = [world.divergence(each, rows, draw + step) for each in young]
        young = [young[i] for i in np.argsort(losses, kind="stable")[:survivors]]
    return young[0]


def _start(world: World, budget: float, generator: np.random.Generator) -> Row:
    """The rung above the budget, with groups taken down at random until it is met."""
    rungs = [row for row in world.ladder() if world.cost(row) >= budget - 1e-9]
    row = min(rungs, key=world.cost)
    while world.cost(row) > budget + 1e-9:
        row = _moved(world, row, 1, generator)
    return row


def _offspring(
    world: World, parent: Row, budget: float, generator: np.random.Generator
) -> list[Row]:
    found: list[Row] = []
    for _ in range(TRIES):
        if len(found) == OFFSPRING:
            break
        flips = min(generator.integers(1, 4), generator.integers(1, 4))
        row = parent
        for _ in range(flips):
            row = _moved(world, row, -1, generator)
        moves = 0
        while world.cost(row) > budget + 1e-9 and moves < 10:
            row = _moved(world, row, 1, generator)
            moves += 1
        if world.cost(row) <= budget + 1e-9 and row != parent and row not in found:
            found.append(row)
    return found


def _moved(world: World, row: Row, by: int, generator: np.random.Generator) -> Row:
    """A group that can be, one level smaller (1) or larger (-1)."""
    can = [
        place
        for place, group in enumerate(world.space)
        if 0 <= row[place] + by < len(group.choices)
    ]
    if not can:
        return row
    place = int(generator.choice(can))
    return (*row[:place], row[place] + by, *row[place + 1 :])
