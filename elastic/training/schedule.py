"""Stages: what is open when, and at which learning rate. Pure arithmetic on the step number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from elastic.config import ScheduleConfig, StageConfig, TrainConfig
from elastic.spaces.bound import BoundSpace, SubAdapter, generator_for
from elastic.spaces.dims import VOCABULARY


def examples_per_step(config: TrainConfig, processes: int = 1) -> int:
    """Of one optimiser step, in all processes."""
    return config.batch_size * config.accumulation * processes


@dataclass(frozen=True)
class Position:
    """Where an optimiser step stands: its stage, and 0-based counts within that stage."""

    stage: int
    step: int
    epoch: int


@dataclass(frozen=True)
class Schedule:
    """All stages of a run; `steps_per_epoch` counts optimiser steps.

    Every answer is a function of the global step alone, so a resumed run continues exactly where
    the interrupted one stood.
    """

    stages: Sequence[StageConfig]
    lr: ScheduleConfig
    steps_per_epoch: int
    max_steps: int | None = None

    @classmethod
    def of(cls, config: TrainConfig, examples: int, processes: int = 1) -> Schedule:
        """Of a run on so many examples; the last step of an epoch may have fewer than the rest."""
        steps = math.ceil(examples / examples_per_step(config, processes))
        return cls(config.resolved_stages, config.lr, steps, config.max_steps)

    @property
    def epochs(self) -> int:
        return sum(stage.epochs for stage in self.stages)

    @property
    def steps(self) -> int:
        whole = self.epochs * self.steps_per_epoch
        return min(whole, self.max_steps or whole)

    def position(self, step: int) -> Position:
        """Of the global step, 0-based; steps past the end belong to the last stage."""
        start = 0
        for number, stage in enumerate(self.stages):
            length = stage.epochs * self.steps_per_epoch
            if step < start + length or number == len(self.stages) - 1:
                within = step - start
                return Position(number, within, within // self.steps_per_epoch)
            start += length
        raise AssertionError("a schedule has at least one stage")

    def learning_rate(self, step: int) -> float:
        """At the global step, 0-based.

        With `init_lr`, the stage's cosine as NNCF computes it, with s the 1-based step and e the
        0-based epoch in the stage, n the steps per epoch:
        lr = init_lr / 2 · (1 + cos(π (s - e) / (epochs_lr · n))), after the stage's own warm-up.
        Otherwise one schedule over all stages: over W epochs a linear warm-up
        lr = warm + (base - warm) · (e · n + b + 1) / (W · n), then the configured shape.
        """
        at = self.position(step)
        stage = self.stages[at.stage]
        if stage.init_lr is None:
            return self._global(step)
        if at.step < stage.warmup_steps:
            return stage.init_lr * (at.step + 1) / stage.warmup_steps
        length = (stage.epochs_lr or stage.epochs) * self.steps_per_epoch
        turn = math.pi * min(1.0, (at.step + 1 - at.epoch) / length)
        return 0.5 * stage.init_lr * (1 + math.cos(turn))

    def _global(self, step: int) -> float:
        warmup = self.lr.warmup_epochs * self.steps_per_epoch
        if step < warmup:
            span = self.lr.base_lr - self.lr.warmup_lr
            return self.lr.warmup_lr + span * min(1.0, (step + 1) / warmup)
        passed = min(1.0, (step - warmup) / max(1.0, self.steps - warmup))
        if self.lr.shape == "constant":
            return self.lr.base_lr
        if self.lr.shape == "linear":
            return self.lr.base_lr * (1 - passed)
        return 0.5 * self.lr.base_lr * (1 + math.cos(math.pi * passed))

    def configured_rate(self, step: int) -> float:
        """The learning rate as configured for the stage of this step, before any schedule."""
        stage = self.stages[self.position(step).stage]
        return self.lr.base_lr if stage.init_lr is None else stage.init_lr

    def closed(self, space: BoundSpace) -> str | None:
        """What to say of dimensions that have choices and stay at full size in every step; None
        where there are none."""
        last = self.steps - 1
        pairs = zip(space, self.open_space(space, last), strict=True)
        dims = {
            group.dim
            for group, opened in pairs
            if group.dim != VOCABULARY and len(opened.choices) == 1 < len(group.choices)
        }
        if not dims:
            return None
        stage = self.position(last).stage
        why = "no stage opens it (train_dims)"
        if stage < len(self.stages) - 1:
            why = (
                f"the {self.steps} steps (max_steps) end in stage {stage + 1} of "
                f"{len(self.stages)}, before it opens"
            )
        names = ", ".join(sorted(dims))
        return f"no sub-adapter with less {names} is trained, for {why}"

    def rising(self) -> str | None:
        """What to say of a warm-up that training ends in; None where it does not."""
        last = self.steps - 1
        at = self.position(last)
        stage = self.stages[at.stage]
        done, warmup = at.step + 1, float(stage.warmup_steps)
        if stage.init_lr is None:
            done, warmup = self.steps, self.lr.warmup_epochs * self.steps_per_epoch
        if done >= warmup:
            return None
        rate, highest = self.learning_rate(last), self.configured_rate(last)
        return (
            f"training ends in its warm-up, after {done} of {warmup:g} steps: the learning rate "
            f"rises to {rate:.1e}, not to {highest:.1e}"
        )

    def open_space(self, space: BoundSpace, step: int) -> BoundSpace:
        """The space of this step: closed dimensions stay maximal, open groups offer their first
        `width_indicator` choices."""
        stage = self.stages[self.position(step).stage]
        groups = []
        for group in space:
            count = stage.width_indicator if group.dim in stage.train_dims else 1
            groups.append(replace(group, choices=group.choices[:count]))
        return replace(space, groups=tuple(groups))


def visits(
    mode: str,
    space: BoundSpace,
    schedule: Schedule,
    step: int,
    *,
    seed: int,
    draw: int = 0,
    maximal_every: int = 4,
) -> tuple[SubAdapter, ...]:
    """What a step trains: a function of its number and the seed, so resuming needs no generator
    state. `draw` tells apart micro-batches or processes that draw on their own.

    uniform: every open group draws on its own, as LoNAS does. stratified: every so many draws the
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
    if (turn + draw) % maximal_every == 0:
        return (opened.maximal(),)
    return (opened.stratified(generator),)
