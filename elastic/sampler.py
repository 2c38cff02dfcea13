"""Which sub-adapter a training step visits."""

from __future__ import annotations

import random

from elastic.schedule import Schedule
from elastic.space import BoundSpace, SubAdapter


def generator_for(seed: int, *purpose: object) -> random.Random:
    """A generator of its own for each purpose. String seeds are hashed with SHA-512 by the
    standard library, alike on every platform."""
    return random.Random("/".join(map(str, (seed, *purpose))))


MAXIMAL_EVERY = 4
"""Uniform draws never train the maximal sub-adapter, which then ends below smaller ones."""


def draw(
    mode: str, space: BoundSpace, schedule: Schedule, step: int, *, seed: int, micro_batch: int = 0
) -> SubAdapter:
    """The sub-adapter of a step: a function of its number and the seed, so resuming needs no
    generator state.

    lonas: every open group draws on its own. stratified: every fourth draw is the maximal
    sub-adapter, the others have a target size of their own (`BoundSpace.stratified`).
    """
    stage = schedule.stages[schedule.position(step).stage]
    turn = step // stage.sample_rate
    opened = schedule.open_space(space, step)
    generator = generator_for(seed, turn, micro_batch)
    if mode == "lonas":
        return opened.random(generator)
    if (turn + micro_batch) % MAXIMAL_EVERY == 0:
        return opened.maximal()
    return opened.stratified(generator)
