"""Elastic training in a loop that is not ours: which sub-adapters a step visits, and a callback for
the Trainer of transformers and those that derive from it, such as TRL's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from elastic.config import TrainConfig
from elastic.errors import ConfigError
from elastic.spaces.bound import BoundSpace, SubAdapter
from elastic.supernet.supernet import Supernet
from elastic.training.schedule import Schedule, visits

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


def visited(
    space: BoundSpace, step: int, steps: int, config: TrainConfig, draw: int = 0
) -> tuple[SubAdapter, ...]:
    """What the 0-based optimiser step `step` of `steps` trains, by the settings `stages`,
    `sampling`, `maximal_every` and `seed`: a function of these alone. Without `stages` the first
    third of the steps trains the maximal sub-adapter. `draw` tells apart what draws on its own."""
    stages = config.resolved_stages
    per_epoch = max(1, math.ceil(steps / sum(stage.epochs for stage in stages)))
    schedule = Schedule(stages, config.lr, per_epoch, steps)
    return visits(
        config.sampling, space, schedule, step,
        seed=config.seed, draw=draw, maximal_every=config.maximal_every,
    )  # fmt: skip


class ElasticCallback(TrainerCallback):
    """Opens a sub-adapter for every step of a Trainer that trains `net.model`:

        SFTTrainer(net.model, callbacks=[elastic.ElasticCallback(net)], ...)

    Between steps, and so in evaluation, the maximal one is active. Where a step has several
    micro-batches (`gradient_accumulation_steps`), `sampling: sandwich` gives the first the maximal,
    the second a stratified and the third the minimal sub-adapter, and so on around. The method's
    regulariser, if it has one, adds its gradient once per step, behind clipping. Not done are what
    only our own trainer does: `distill`, and a learning rate of its own for B (`adapter.lr_ratio`).
    """

    def __init__(self, net: Any, settings: TrainConfig | None = None) -> None:
        """`net` is what `elastic.attach` gives, or a `Supernet`. Of the settings `stages`,
        `sampling`, `sample_each`, `maximal_every` and `seed` are read."""
        self._given = net
        self.net: Supernet = getattr(net, "supernet", net)
        self.settings = settings or TrainConfig()
        self._number = 0
        """Of the micro-batch within its step."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """ConfigError for a Trainer of another model, or steps that are too short for their
        visits."""
        mine = {id(parameter) for _, adapter in self.net.adapters()
                for parameter in adapter.parameters()}  # fmt: skip
        if not mine & {id(parameter) for parameter in model.parameters()}:
            raise ConfigError(
                "ElasticCallback: the Trainer has another model than the one that carries the "
                "super-adapter; give it net.model"
            )
        parts = args.gradient_accumulation_steps
        visits_per_step = 3 if self.settings.sampling == "sandwich" else 1
        if parts < visits_per_step:
            raise ConfigError(
                f"ElasticCallback: sampling sandwich visits three sub-adapters in a step, which "
                f"has {parts} micro-batches; give gradient_accumulation_steps 3 or more, or "
                "another sampling"
            )
        if self._given is not self.net:
            self._given.is_trained = True  # its channels stay in the order that they have now

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open what the first micro-batch of the step trains."""
        self.net.advance(state.global_step, state.max_steps)
        self._open(state, 0)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open what the next micro-batch trains."""
        self._open(state, self._number + 1)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the gradient of the method's regulariser, if it has one."""
        penalty = self.net.penalty(args.learning_rate)
        if penalty is None or not penalty.requires_grad:
            return
        trained = [p for p in self.net.model.parameters() if p.requires_grad]
        found = torch.autograd.grad(penalty, trained, allow_unused=True)
        for parameter, gradient in zip(trained, found, strict=True):
            if gradient is not None:
                before = parameter.grad
                parameter.grad = gradient if before is None else before + gradient

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The maximal sub-adapter is active between steps."""
        self.net.activate(self.net.space.maximal())

    def _open(self, state: TrainerState, number: int) -> None:
        self._number = number
        draw = number if self.settings.draw_for != "step" else 0
        space = self.net.space
        found = visited(space, state.global_step, state.max_steps, self.settings, draw)
        self.net.activate(found[number % len(found)])
