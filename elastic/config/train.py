"""Settings of `elastic train`: stages, learning rates, a sequence of tasks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from elastic.config.adapter import AdapterConfig
from elastic.config.model import ModelConfig, TaskConfig
from elastic.config.numbers import require_numbers
from elastic.errors import require

Dim = Literal["rank", "width", "heads", "query_heads", "expert_width", "experts", "depth"]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of training: what is open, for how long, at which learning rate.

    The semantics are those of the NNCF stage descriptors that LoNAS runs on. Three of their fields
    are absent: depth_indicator (a depth is one more group, see `width_indicator`), bn_adapt
    (transformers have no batch statistics), reorg_weights (the order of channels is settled before
    training, see `order`).
    """

    train_dims: list[Dim] = field(default_factory=list)
    """Dimensions that shrink in this stage; the others stay maximal."""
    epochs: int = 1
    """Passes over the training examples."""
    width_indicator: int | None = None
    """How many of the first choices of every open group are drawn; unset opens all."""
    init_lr: float | None = None
    """Start of this stage's cosine; unset follows the global schedule (`lr`)."""
    epochs_lr: int | None = None
    """Length of the cosine in epochs; unset is `epochs`."""
    warmup_steps: int = 0
    """Linear warm-up inside the stage, before its cosine."""
    sample_rate: int = 1
    """A new sub-adapter every this many steps."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"a stage lasts at least 1 epoch, not {self.epochs}")
        require(self.sample_rate >= 1, f"sample_rate is {self.sample_rate}; at least 1")
        require(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}; at least 0")
        for name in ("width_indicator", "epochs_lr"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}; at least 1")
        require(self.init_lr is None or self.init_lr > 0, f"init_lr is {self.init_lr}; above 0")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """One learning-rate schedule over all stages; exclusive with a stage's `init_lr`."""

    base_lr: float = 1e-3
    """The highest learning rate, where warm-up ends."""
    warmup_lr: float = 0.0
    """Where the linear warm-up starts."""
    warmup_epochs: float = 0.0
    """Length of the linear warm-up."""
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    """What follows it: a cosine or a line down to zero, or the base rate throughout."""

    def __post_init__(self) -> None:
        require(self.base_lr > 0, f"lr.base_lr is {self.base_lr}; it must be positive")
        require(self.warmup_lr >= 0, f"lr.warmup_lr is {self.warmup_lr}; at least 0")
        require(self.warmup_epochs >= 0, f"lr.warmup_epochs is {self.warmup_epochs}; at least 0")


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """What changes from task to task; a list has one value per task, unset keeps the run's."""

    lambda_1: list[float] | None = None
    """adapter.olora.lambda_1 of each task."""
    lambda_2: list[float] | None = None
    """adapter.olora.lambda_2 of each task."""
    base_lr: list[float] | None = None
    """lr.base_lr of each task."""
    epochs: list[int] | None = None
    """Epochs of the last stage in each task."""
    new_tokens: int = 50
    """Most tokens of a generated answer."""
    batch: int = 32
    """Prompts answered at once; the score does not depend on it."""

    def __post_init__(self) -> None:
        for name in ("new_tokens", "batch"):
            value = getattr(self, name)
            require(value >= 1, f"sequence.{name} is {value}; at least 1")

    def lists(self) -> dict[str, list[Any]]:
        """Those that were set."""
        return {name: value for name, value in vars(self).items() if isinstance(value, list)}


@dataclass(frozen=True, kw_only=True)
class VocabConfig:
    """Which tokens a head may do without, of a space with a group of `dim: vocab`."""

    text: str | None = None
    """A file of text, UTF-8, whose tokens are kept longest, behind those of the training answers,
    which always stay; unset, the task's own prompts and answers. Tasks whose answers are generated
    and judged need one."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Trains a super-adapter: one adapter that contains every sub-adapter of a search space."""

    run: str = "runs/default"
    """The run directory. Running the same command again resumes or finds it finished."""
    model: ModelConfig = field(default_factory=ModelConfig)
    space: str = "auto"
    """A shipped search space or a YAML file. auto: the one shipped for this type of model, else
    what the structure of its modules says; auto-deep: that, with the number of blocks that run."""
    ranks: Literal["auto", "elastic", "whole"] = "auto"
    """whole: no sub-adapter cuts the rank of its updates, which costs nothing once they are merged,
    so that every step trains all ranks. elastic: as the space has them. auto: elastic where a stage
    opens rank, for `sampling: lonas`, for an adapter that is taken over, and in a space of ranks
    alone; else whole."""
    order: Literal["auto", "activation", "norm", "none"] = "auto"
    """What decides which channels come first, and are therefore kept longest. auto: activation,
    or none for `sampling: lonas`."""
    vocab: VocabConfig = field(default_factory=VocabConfig)
    order_examples: int = 64
    """Training examples of the calibration pass behind `order: activation`."""
    compensation_examples: int = 512
    """Training examples of the calibration pass after training, from which a sub-adapter makes up
    for channels that it cuts (`compensation` of the other commands); 0: none."""
    compensation_in_training: float = 0.0
    """Part of what a step's sub-adapter cuts that is made up for while it is trained, too, from a
    calibration pass before training. What is trained so is best used with the same part of it."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    tasks: list[str] = field(default_factory=list)
    """Names of tasks to train one after another, testing all seen ones after each: {task} in the
    settings of `task` stands for the name. O-LoRA (adapter.method olora) is made for this."""
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    start_from: str | None = None
    """A finished run of the same base, space and method to continue from, with its channel
    order; O-LoRA freezes what that run trained and adds new factors. `--from RUN` says the same
    and takes over that run's settings."""
    sub_adapter: str | None = None
    """With start_from: train on only this sub-adapter of that run, at its small size. A name of its
    front, a JSON file, or maximal, heuristic, minimal, uniform-FRACTION. With `distill` it learns
    from what that run's maximal sub-adapter answers."""
    stages: list[StageConfig] = field(default_factory=list)
    """Trained one after another. Unset: a maximal epoch, then two with everything open that the
    space has (see `ranks`); for `sampling: lonas` three with everything open."""
    progressivity: list[Dim] = field(
        default_factory=lambda: [
            "rank", "width", "heads", "query_heads", "expert_width", "experts", "depth"
        ]
    )  # fmt: skip
    """The order in which stages may open dimensions, those left out that none opens; an open one
    never closes."""
    max_steps: int | None = None
    """Ends training after so many optimiser steps, whatever the stages would take; the learning
    rate of `lr` goes down with them, that of a stage's `init_lr` as if it took all of it."""
    lr: ScheduleConfig = field(default_factory=ScheduleConfig)
    sampling: Literal["stratified", "sandwich", "uniform", "lonas"] = "stratified"
    """stratified: a target size first, then choices near it, and the maximal sub-adapter now and
    then (`maximal_every`). sandwich: the maximal, the minimal and a stratified one in every step,
    which costs more than two steps. uniform: every group draws on its own. lonas: as published,
    uniform for every micro-batch, channels in no particular order, all open from the start."""
    maximal_every: int = 4
    """Of stratified draws every this many is the maximal sub-adapter, which uniform ones hardly
    ever train."""
    sample_each: Literal["auto", "step", "micro_batch", "process"] = "auto"
    """Draw once per optimiser step, anew for every micro-batch, or for every micro-batch of every
    process. auto: step, or micro_batch for `sampling: lonas`."""
    distill: float = 0.0
    """Weight of in-place distillation: how much of a smaller sub-adapter's loss is the divergence
    from the maximal one's answer distribution instead of the labels. Costs a forward pass."""
    batch_size: int = 16
    """Sequences per micro-batch."""
    accumulation: int = 1
    """Micro-batches per optimiser step."""
    packing: bool = False
    """Put several short sequences of a micro-batch into one row, each seeing itself alone, instead
    of taking sequences of similar length together. Pays where answers are long and lengths differ
    much; decoders with a language head only."""
    weight_decay: float = 0.0
    """Of AdamW, for all that is trained."""
    max_grad_norm: float = 1.0
    """Gradients of a step are scaled down to this norm; 0 leaves them as they are."""
    gradient_checkpointing: bool = False
    """Keep only what enters each layer and compute the rest again in the backward pass: the same
    gradients with less memory, for about half more time (frozen weights have no gradient)."""
    save_steps: int = 50
    """A checkpoint to resume from every this many optimiser steps."""
    probe_steps: int = 25
    """The losses of the maximal, a random and the minimal sub-adapter are measured on the same
    validation examples after every this many steps; 0 never."""
    report_to: list[str] = field(default_factory=list)
    """Trackers beside metrics.jsonl: tensorboard, wandb, mlflow, trackio (extras of these names),
    which stay on this machine unless the tracker's own variables say otherwise (WANDB_MODE=online,
    MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID); or another of the Hugging Face Trainer's."""
    seed: int = 0
    """Of all that is drawn: examples, how factors start, the order of batches, sub-adapters."""
    dry_run: bool = False
    """Only print the space, sizes, memory and compute that these settings lead to; reads no weights
    and writes nothing. A model folder with config.json alone will do."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require(self.probe_steps >= 0, f"probe_steps is {self.probe_steps}; at least 0")
        require(
            self.sub_adapter is None or self.start_from is not None,
            "sub_adapter: name the run that it belongs to; give start_from (or --from RUN)",
        )
        for name in ("batch_size", "accumulation", "save_steps", "order_examples", "maximal_every"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; at least 1")
        for name in ("weight_decay", "max_grad_norm"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; at least 0")
        most = self.max_steps
        require(most is None or most >= 1, f"max_steps is {most}; at least 1")
        least = self.compensation_examples
        require(least >= 0, f"compensation_examples is {least}; at least 0")
        part = self.compensation_in_training
        require(0 <= part <= 1, f"compensation_in_training is {part}; choose from [0, 1]")
        require(
            not part or (self.compensation_examples > 0 and self.start_from is None),
            f"compensation_in_training {part}: it needs compensation_examples, and a run that "
            "begins anew; leave out start_from",
        )
        taken = self.adapter.taken_from
        require(
            taken is None or not (self.tasks or self.start_from or self.dry_run),
            f"adapter.from {taken}: nothing is trained; leave out tasks, start_from and dry_run",
        )
        require(0 <= self.distill <= 1, f"distill is {self.distill}; choose from [0, 1]")
        twice = {name for name in self.tasks if self.tasks.count(name) > 1}
        require(not twice, f"tasks names {', '.join(sorted(twice))} twice")
        for name, values in self.sequence.lists().items():
            require(
                len(values) == len(self.tasks),
                f"sequence.{name} has {len(values)} values for {len(self.tasks)} tasks",
            )
        require(
            self.ranks != "whole" or not any("rank" in stage.train_dims for stage in self.stages),
            "ranks whole: no stage can open rank; leave it out of train_dims, or give elastic",
        )
        open_before: set[Dim] = set()
        ever = {dim for stage in self.stages for dim in stage.train_dims}
        order = [dim for dim in self.progressivity if dim in ever]
        for number, stage in enumerate(self.stages):
            opened = set(stage.train_dims)
            allowed = set(order[: len(opened)])
            require(
                opened == allowed and open_before <= opened,
                f"stages[{number}].train_dims {sorted(opened)}: dimensions open in the order of "
                f"progressivity {self.progressivity} and stay open",
            )
            open_before = opened
        with_lr = [stage.init_lr is not None for stage in self.stages]
        require(
            all(with_lr) or not any(with_lr),
            "stages: give init_lr to every stage, or to none and use the global schedule lr",
        )

    @property
    def has_whole_ranks(self) -> bool:
        """Whether the ranks of a space with more than ranks are left alone."""
        if self.ranks != "auto":
            return self.ranks == "whole"
        opened = any("rank" in stage.train_dims for stage in self.stages)
        return not opened and self.sampling != "lonas" and self.adapter.taken_from is None

    @property
    def resolved_order(self) -> Literal["activation", "norm", "none"]:
        """`order`, with auto decided."""
        if self.order != "auto":
            return self.order
        return "none" if self.sampling == "lonas" else "activation"

    @property
    def draw_for(self) -> Literal["step", "micro_batch", "process"]:
        """`sample_each`, with auto decided."""
        if self.sample_each != "auto":
            return self.sample_each
        return "micro_batch" if self.sampling == "lonas" else "step"

    @property
    def resolved_stages(self) -> list[StageConfig]:
        """`stages`, or what unset means."""
        if self.stages:
            return self.stages
        everything = StageConfig(train_dims=self.progressivity, epochs=2)
        if self.sampling == "lonas":
            return [replace(everything, epochs=3)]
        return [StageConfig(), everything]
