"""Ours as it is: what every choice alone diverges, then accuracies of what is believed best."""

from __future__ import annotations

from elastic.searching import screening
from elastic.searching.sampler import AdditiveSampler, learn
from tests.benchmarks.rival_samplers import measured_by
from tests.benchmarks.worlds import Row, World, selected

SHARE = 0.5
"""Of what may be spent, for divergences at most."""
KEPT = 10
"""Accuracies that are left in any case."""


def screened(world: World, seed: int) -> list[Row]:
    """`sampler: additive` with as many rows to screen as half of the budget has."""
    space = world.space
    room = min(SHARE * world.left, world.left - KEPT * world.examples)
    rows = max(1, min(world.most_rows, int(room / world.passes / screening.count(space))))
    found = screening.screen(
        space, lambda sub: world.divergence(space.indices(sub).values(), rows), quiet=True
    )
    parts = screening.parts(found)
    sampler = AdditiveSampler(
        space, examples=world.examples, tables=[world.table], parts=parts, seed=seed
    )
    starts = [world.maximal, world.minimal]
    measured = measured_by(world, f"screened {seed} {rows}", sampler, starts)
    names = [group.name for group in space]
    shares = {space.at(dict(zip(names, row, strict=True))): y for row, y in measured.items()}
    belief = learn(space, shares, world.examples, parts=parts)
    values = dict(zip(measured, belief.fitted.tolist(), strict=True))
    return selected(world, values)
