"""Trains a super-adapter. Names no method and no task."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from elastic import models
from elastic.adapters import METHODS, check
from elastic.batching import IGNORED, Encoded, SimilarLengths, answer_logits, collate, encode
from elastic.config import TrainConfig
from elastic.errors import ConfigError
from elastic.files import named_failure
from elastic.importance import channel_order
from elastic.loss import answer_loss
from elastic.progress import counting_bar, say
from elastic.run import Run
from elastic.sampler import visits
from elastic.schedule import Schedule
from elastic.space import SearchSpace
from elastic.supernet import FACTORS, Supernet, read_super_adapter, read_tensors, save_super_adapter
from elastic.tasks import load_task


class ElasticTrainer(Trainer):
    """The Hugging Face Trainer with a sub-adapter active in every step.

    What it changes: the loss is on answers only, a sub-adapter is drawn per optimiser step (or per
    micro-batch), the method's regulariser adds its gradient once per optimiser step, the learning
    rate follows the stages, checkpoints hold factors instead of the model.
    """

    def __init__(self, net: Supernet, config: TrainConfig, schedule: Schedule, **kwargs) -> None:
        self.net = net
        self.config = config
        self.schedule = schedule
        self._micro_batch = (0, 0)  # the optimiser step, and how many of its micro-batches are done
        self._visits = (net.current,)
        self._teacher: Tensor | None = None  # the maximal sub-adapter's logits of this micro-batch
        self._penalty: float | None = None
        super().__init__(model=net.model, **kwargs)
        self._clip_penalty = METHODS[net.adapter.resolved_method].clip_penalty
        if not self._clip_penalty:
            self.add_callback(_BeforeOptimizer(self.regularise))
        # The loss below divides by the answer tokens of the whole step.
        self.model_accepts_loss_kwargs = True

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        # Counted anew in every step: the last one of an epoch may have fewer of them, and a
        # resumed run has seen none.
        step, done = self._micro_batch
        number = done if step == self.state.global_step else 0
        self._micro_batch = (self.state.global_step, number + 1)
        if number == 0:
            self.net.advance(self.state.global_step, self.schedule.steps)
        self._visits = visits(
            self.config.sampling.replace("lonas", "uniform"),
            self.net.space,
            self.schedule,
            self.state.global_step,
            seed=self.config.seed,
            draw=number if self.config.draws_per_micro_batch else 0,
        )
        self._teacher = None
        losses = []
        for sub in self._visits:
            with self.net.active(sub):
                losses.append(super().training_step(model, inputs, num_items_in_batch))
        loss = torch.stack(losses).sum()
        # True in the last micro-batch of a step, when all processes have the summed gradient.
        if self.accelerator.sync_gradients and self._clip_penalty:
            self.regularise()
        return loss

    def regularise(self) -> None:
        """Add the regulariser's gradient for the largest sub-adapter of this step (of its last
        micro-batch when each has its own): once, undivided, alike in every process."""
        learning_rate = self.schedule.configured_rate(self.state.global_step)
        with self.net.active(self._visits[0]):
            penalty = self.net.penalty(learning_rate)
        self._penalty = None if penalty is None else float(penalty.detach())
        if penalty is None or not penalty.requires_grad:
            return
        trained = [p for p in self.net.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(penalty, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """The loss logged is the task's alone; the regulariser stands beside it."""
        if "loss" in logs and self._penalty is not None:
            logs = {**logs, "penalty": self._penalty}
        super().log(logs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The answer tokens' loss, averaged over all of them in the optimiser step and over the
        sub-adapters that it visits."""
        logits, labels = answer_logits(model, inputs)
        teacher = self._teach(model, inputs, logits) if self.config.distill else None
        total = answer_loss(logits, labels, teacher, self.config.distill) / len(self._visits)
        if num_items_in_batch is None:
            return total / (labels != IGNORED).sum()
        # Counted over all processes, whose gradients are averaged.
        return total * self.accelerator.num_processes / num_items_in_batch

    def _teach(self, model: nn.Module, inputs: dict[str, Any], logits: Tensor) -> Tensor | None:
        """The maximal sub-adapter's logits on this micro-batch; None when it is the one active."""
        maximal = self.net.space.maximal()
        if self.net.current == maximal:
            self._teacher = logits.detach()
            return None
        if self._teacher is None:
            with torch.no_grad(), self.net.active(maximal):
                self._teacher, _ = answer_logits(model, inputs)
        return self._teacher

    def _get_train_sampler(self, train_dataset=None) -> SimilarLengths:
        args = self.args
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        lengths = [sequence.length for sequence in self.train_dataset]

        def epoch() -> int:
            return self.state.global_step // self.schedule.steps_per_epoch

        return SimilarLengths(lengths, step, self.config.seed, epoch)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        ratio = self.net.adapter.lr_ratio
        if ratio == 1:
            return optimizer
        adapters = (adapter for _, adapter in self.net.adapters())
        fast = {id(getattr(adapter, name)) for adapter in adapters for name in adapter.fast}
        for group in list(optimizer.param_groups):
            theirs = [p for p in group["params"] if id(p) in fast]
            if theirs:
                group["params"] = [p for p in group["params"] if id(p) not in fast]
                optimizer.add_param_group({**group, "params": theirs, "lr": group["lr"] * ratio})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        # The optimiser's own rate is 1, so the factor is the rate; the Trainer saves the
        # scheduler with every checkpoint.
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, self.schedule.learning_rate
        )
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        from safetensors.torch import save_file

        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.cpu() for name, tensor in self.net.factor_state().items()}
        save_file(state, directory / FACTORS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        from safetensors.torch import load_file

        self.net.load_factors(load_file(Path(resume_from_checkpoint) / FACTORS))


class _BeforeOptimizer(TrainerCallback):
    """Calls a function between clipping and the optimiser's step."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.act()


class MetricsFile(TrainerCallback):
    """One JSON object per optimiser step in train/metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # Steps after the checkpoint are trained again; their old lines must not stay.
        kept = []
        if self.path.is_file():
            # A kill may have cut the last line short: it ends without a line break.
            lines = self.path.read_text().splitlines(keepends=True)
            rows = [json.loads(line) for line in lines if line.endswith("\n")]
            kept = [row for row in rows if row["step"] <= state.global_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        row = {name: float(value) for name, value in (logs or {}).items() if _is_finite(value)}
        if "loss" in row:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **row}) + "\n")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class Bar(TrainerCallback):
    """A progress bar on stderr with the latest loss."""

    def __init__(self) -> None:
        self.progress = counting_bar(transient=False)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.progress.start()
        self.task = self.progress.add_task(
            "training", total=state.max_steps, completed=state.global_step
        )

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self.progress.update(self.task, description=f"training, loss {logs['loss']:.3f}")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.progress.stop()


def train(config: TrainConfig) -> Run:
    """Train as configured and write RUN/super_adapter; returns the run.

    Space, data and run directory are checked before weights are read. A run of the same
    configuration is resumed from its last checkpoint, or returned as it is when finished.
    """
    run = Run(config.run)
    if run.claim(config):
        say(f"{run.path}: already trained; nothing to do")
        return run
    before = predecessor(config) if config.start_from else None
    space = SearchSpace.load(config.space)
    skeleton = models.skeleton(config.model)
    check(config.adapter, skeleton, space.bind(skeleton, config.adapter.rank))
    task = load_task(config.task, config.seed)
    run.begin(config)

    say(f"Loading {config.model.path}")
    base = models.load(config.model)
    encoded = [
        encode(base.tokenizer, example.prompt, example.answer,
               encoder_decoder=base.model.config.is_encoder_decoder)
        for example in task.train
    ]  # fmt: skip
    if before:
        net = continued(base, space, config, before)
    else:
        pad = base.tokenizer.pad_token_id
        net = build(base.model, space, config, calibration=encoded, pad=pad)
    per_step = config.batch_size * config.accumulation
    schedule = Schedule(
        config.resolved_stages, config.lr, max(1, math.ceil(len(encoded) / per_step))
    )
    say(
        f"Training {net.space.size:.1e} sub-adapters in one: {schedule.steps} steps of {per_step} "
        f"examples, {str(base.model.dtype).removeprefix('torch.')} on {base.model.device}"
    )
    with named_failure(run.checkpoints):
        fit(net, config, schedule, encoded, run, pad=base.tokenizer.pad_token_id)
    save_super_adapter(
        net,
        run.super_adapter,
        model=config.model,
        base_digest=base.digest,
        seed=config.seed,
        steps=schedule.steps,
        learning_rate=schedule.learning_rate(schedule.steps - 1),
    )
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    return run


def build(
    model, space: SearchSpace, config: TrainConfig, *, calibration: list[Encoded], pad: int
) -> Supernet:
    """The supernet at the start of training, its channels ordered."""
    bound = space.bind(model, config.adapter.rank)
    examples = calibration[: config.order_examples]
    batches = []
    for start in range(0, len(examples), config.batch_size):
        batch = collate(examples[start : start + config.batch_size], pad)
        batches.append({key: value.to(model.device) for key, value in batch.items()})
    if config.resolved_order == "activation":
        say(f"Ordering channels by activation on {len(examples)} training examples")
    order = channel_order(model, bound, config.resolved_order, batches)
    return Supernet(model, space, config.adapter, order=order, seed=config.seed)


def predecessor(config: TrainConfig) -> Run:
    """The finished run to continue from; ConfigError if it trained something else."""
    before = Run(config.start_from)
    theirs = before.config()
    for name in ("method", "rank", "scale"):
        field = "resolved_method" if name == "method" else name
        mine, other = getattr(config.adapter, field), getattr(theirs.adapter, field)
        if mine != other:
            raise ConfigError(
                f"start_from: {before.path} was trained with adapter {name} {other}, not {mine}; "
                "a sequence keeps one method, rank and scale"
            )
    if SearchSpace.load(config.space).sections != before.space().sections:
        raise ConfigError(
            f"start_from: {before.path} was trained in another search space than {config.space}; "
            f"a sequence keeps one"
        )
    return before


def continued(base: models.Base, space: SearchSpace, config: TrainConfig, before: Run) -> Supernet:
    """The supernet in which the next task begins; BaseMismatch on another base model."""
    read_super_adapter(before.super_adapter, base.digest)
    order, factors = read_tensors(before.super_adapter)
    net = Supernet(base.model, space, config.adapter, order=order, start=False)
    net.succeed(factors, config.seed)
    return net


def last_checkpoint(directory: Path) -> str | None:
    """The newest complete checkpoint; what a kill left half-written is removed.

    The Trainer writes trainer_state.json last.
    """
    complete = []
    for folder in directory.glob("checkpoint-*"):
        try:
            state = json.loads((folder / "trainer_state.json").read_text())
            complete.append((state["global_step"], str(folder)))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(folder, ignore_errors=True)
    return max(complete)[1] if complete else None


def fit(
    net: Supernet,
    config: TrainConfig,
    schedule: Schedule,
    encoded: list[Encoded],
    run: Run,
    *,
    pad: int,
) -> ElasticTrainer:
    """Run all stages on the encoded examples, resuming from a checkpoint of `run`."""
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=schedule.epochs,
        learning_rate=1.0,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        logging_steps=1,
        save_steps=config.save_steps,
        save_total_limit=1,
        seed=config.seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=net.model.device.type == "cpu",
        dataloader_pin_memory=net.model.device.type == "cuda",
    )
    trainer = ElasticTrainer(
        net,
        config,
        schedule,
        args=arguments,
        train_dataset=encoded,
        data_collator=lambda sequences: collate(sequences, pad),
        callbacks=[MetricsFile(run.metrics), Bar()],
    )
    trainer.remove_callback(
        next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback")
    )
    checkpoint = last_checkpoint(run.checkpoints)
    if checkpoint:
        say(f"Resuming from {checkpoint}")
    net.model.train()
    trainer.train(resume_from_checkpoint=checkpoint)
    net.model.eval()
    return trainer
