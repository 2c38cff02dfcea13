"""The sub-adapters one training step visits."""

from __future__ import annotations

from elastic.schedule import Schedule
from elastic.spaces.bound import BoundSpace, SubAdapter, generator_for

MAXIMAL_EVERY = 4
"""Uniform draws never train the maximal sub-adapter, which then ends below smaller ones."""


def visits(
    mode: str, space: BoundSpace, schedule: Schedule, step: int, *, seed: int, draw: int = 0
) -> tuple[SubAdapter, ...]:
    """What a step trains: a function of its number and the seed, so resuming needs no generator
    state. `draw` tells apart micro-batches or processes that draw on their own.

    uniform: every open group draws on its own, as LoNAS does. stratified: every fourth draw is the
    maximal sub-adapter, the others have a target size of their own (`BoundSpace.stratified`).
    sandwich: the maximal, a stratified one and the minimal, all on the same examples (Yu and Huang
    2019, arXiv 1903.05134), at the cost of about 2.3 maximal ones.
    """
    stage = schedule.stages[schedule.position(step).stage]
    turn = step // stage.sample_rate
    opened = schedule.open_space(space, step)
    generator = generator_for(seed, turn, draw)
    if mode in ("uniform", "lonas"):
        return (opened.random(generator),)
    if mode == "sandwich":
        three = (opened.maximal(), opened.stratified(generator), opened.minimal())
        return tuple(dict.fromkeys(three))
    if (turn + draw) % MAXIMAL_EVERY == 0:
        return (opened.maximal(),)
    return (opened.stratified(generator),)
