"""The training loop. Names no method and no task."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer

from elastic import trackers
from elastic.adapters import METHODS
from elastic.config import TrainConfig
from elastic.console import say
from elastic.data.answers import answer_logits, answer_loss
from elastic.data.collating import IGNORED, SimilarLengths, collate, pack
from elastic.data.encoding import Encoded
from elastic.errors import ElasticError, ModelError, TrainingError
from elastic.files import write_json
from elastic.models.modules import module_tree
from elastic.plain import one_line
from elastic.run import Run
from elastic.spaces.bound import SubAdapter
from elastic.supernet.store import FACTORS, read_factors
from elastic.supernet.supernet import Supernet
from elastic.training import checkpoints
from elastic.training.arguments import arguments_of, as_before
from elastic.training.callbacks import Bar, BeforeOptimizer, MetricsFile, Pace, Probe, reporting
from elastic.training.gradients import tell_unreached
from elastic.training.schedule import Schedule, examples_per_step, visits


class ElasticTrainer(Trainer):
    """The Hugging Face Trainer with a sub-adapter active in every step.

    What it changes: the loss is on answers only, a step visits sub-adapters (drawn per optimiser
    step, micro-batch or process), the method's regulariser adds its gradient once per optimiser
    step, the learning rate follows the stages, batches hold similar lengths, checkpoints are whole
    and hold factors instead of the model, and a loss that is no number ends the run.
    """

    def __init__(
        self,
        net: Supernet,
        config: TrainConfig,
        schedule: Schedule,
        *,
        only: SubAdapter | None = None,
        teacher: nn.Module | None = None,
        degree: float = 0.0,
        probe: Probe | None = None,
        **kwargs: Any,
    ) -> None:
        """`only`: the one sub-adapter to train; `teacher`: what `distill` learns from instead of
        the maximal one as it trains; `degree`: how much of what is cut is made up for in every
        step."""
        self.net = net
        self.config = config
        self.schedule = schedule
        self.only = only
        self.degree = degree
        self.probe = probe
        self.pace = Pace()
        self._micro_batch = (0, 0)  # the optimiser step, and how many of its micro-batches are done
        self._visits: tuple[SubAdapter, ...] = (only or net.current,)
        self._fixed_teacher = teacher
        self._teacher: Tensor | None = None  # its logits on this micro-batch
        self._penalty: float | None = None
        self._looked = False  # whether some factors are out of the loss's reach
        super().__init__(model=net.model, **kwargs)
        # DeepSpeed takes the optimiser's step inside its backward pass: whatever is to have a
        # gradient by then stands in the loss.
        self.penalty_in_loss = bool(self.is_deepspeed_enabled)
        self._task_loss: Tensor | None = None  # without the regulariser, where that is in the loss
        self._clip_penalty = METHODS[net.adapter.resolved_method].clip_penalty
        if not self._clip_penalty:
            self.add_callback(BeforeOptimizer(self.regularise))
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
        inputs = dict(inputs)
        examples = inputs.pop("example")
        world = self.args.world_size
        real = inputs["segments" if self.config.packing else "attention_mask"] > 0
        self.pace.add(world * len(examples), world * int(real.sum()))
        self._visits = self._draw(number)
        self._teacher = None
        losses = []
        for sub in self._visits:
            with self.net.active(sub, self.degree):
                loss = super().training_step(model, inputs, num_items_in_batch)
            losses.append(loss if self._task_loss is None else self._task_loss)
            if not torch.isfinite(losses[-1]):
                what = f"the loss is {float(losses[-1])}"
                self._fail(self.state.global_step + 1, what, sub, examples.tolist())
        # True in the last micro-batch of a step, when all processes have the summed gradient.
        if self.accelerator.sync_gradients:
            if not self._looked and not self.is_sharded:
                tell_unreached(self.net, self._visits)
            self._looked = True
            if self._clip_penalty:
                self.regularise()
        return torch.stack(losses).sum()

    def _draw(self, micro_batch: int) -> tuple[SubAdapter, ...]:
        if self.only:
            return (self.only,)
        args, draw = self.args, 0
        if self.config.draw_for == "micro_batch":
            draw = micro_batch
        elif self.config.draw_for == "process":
            draw = micro_batch * args.world_size + args.process_index
        return visits(
            self.config.sampling,
            self.net.space,
            self.schedule,
            self.state.global_step,
            seed=self.config.seed,
            draw=draw,
            maximal_every=self.config.maximal_every,
        )

    def _fail(self, step: int, what: str, sub: SubAdapter, examples: Sequence[int]) -> None:
        """End the run in this 1-based step, saying where; whole checkpoints stay."""
        stage = self.schedule.position(step - 1).stage + 1
        kept = checkpoints.newest(Path(self.args.output_dir))
        file = Path(self.args.output_dir).parent / "failed.json"
        about = {"step": step, "stage": stage, "examples": list(examples)}
        write_json(file, {**about, "sub_adapter": sub.as_dict(), "what": what})
        last = f"the checkpoint of step {checkpoints.step_of(kept)}" if kept else "no checkpoint"
        where = f" on training examples {list(examples)}" if examples else ""
        raise TrainingError(
            f"step {step}, stage {stage}: {what}{where} (the sub-adapter is in {file}); kept: "
            f"{last}. Lower lr.base_lr or max_grad_norm, lengthen the warm-up, or look at the data"
        )

    def penalty(self) -> Tensor | None:
        """The regulariser for the largest sub-adapter of this step (of its last micro-batch when
        each has its own), alike in every process; None where it has no gradient."""
        learning_rate = self.schedule.configured_rate(self.state.global_step)
        # Of the same one in every process, even when each draws its own for the loss.
        sub = self._visits[0] if self.config.draw_for != "process" else self.net.space.maximal()
        with self.net.active(sub):
            penalty = self.net.penalty(learning_rate)
        self._penalty = None if penalty is None else float(penalty.detach())
        return penalty if penalty is not None and penalty.requires_grad else None

    def regularise(self) -> None:
        """Add its gradient to the task's: once, undivided."""
        penalty = None if self.penalty_in_loss else self.penalty()
        if penalty is None:
            return
        trained = [p for p in self.net.model.parameters() if p.requires_grad]
        # A loss scaler has multiplied the task's gradients, and divides all of them in clipping.
        scaler = self.accelerator.scaler if self._clip_penalty else None
        scaled = penalty if scaler is None else penalty * scaler.get_scale()
        gradients = torch.autograd.grad(scaled, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Beside the task's loss: stage, pace, regulariser, and now and then the probe."""
        if "loss" in logs:
            step = self.state.global_step
            logs = {**logs, "stage": self.schedule.position(step - 1).stage + 1}
            logs |= self.pace.read()
            if self._penalty is not None:
                logs["penalty"] = self._penalty
            if self.probe and step % self.probe.every == 0:
                logs |= self.probe.losses(self.model_wrapped)
        super().log(logs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The answer tokens' loss, averaged over all of them in the optimiser step and over the
        sub-adapters that it visits. ModelError for texts that the model's code refuses."""
        try:
            logits, labels = answer_logits(model, inputs)
        except ValueError as error:  # such as of lengths that a model can be used on, not trained
            if isinstance(error, ElasticError):
                raise
            raise ModelError(
                f"{type(self.net.model).__name__} refuses a batch of "
                f"{inputs['input_ids'].shape[1]} tokens in training; its own code says "
                f"{one_line(error)}"
            ) from error
        teacher = self._teach(model, inputs, logits) if self.config.distill else None
        total = answer_loss(logits, labels, teacher, self.config.distill) / len(self._visits)
        if num_items_in_batch is None:
            return total / (labels != IGNORED).sum()
        # Counted over all processes, whose gradients are averaged.
        loss = total * self.accelerator.num_processes / num_items_in_batch
        self._task_loss = None
        if not self.penalty_in_loss or not self.accelerator.sync_gradients:
            return loss
        penalty = self.penalty()
        if penalty is None:
            return loss
        self._task_loss = loss.detach()
        return loss + penalty

    def _teach(self, model: nn.Module, inputs: dict[str, Any], logits: Tensor) -> Tensor | None:
        """The teacher's logits on this micro-batch; None when it is the one active itself."""
        if self._teacher is not None:
            return self._teacher
        if self._fixed_teacher is not None:
            with torch.no_grad():
                self._teacher, _ = answer_logits(self._fixed_teacher, inputs)
            return self._teacher
        maximal = self.net.space.maximal()
        if self.net.current == maximal:
            self._teacher = logits.detach()
            return None
        with torch.no_grad(), self.net.active(maximal):
            self._teacher, _ = answer_logits(model, inputs)
        return self._teacher

    def _get_train_sampler(self, train_dataset: Any = None) -> SimilarLengths:
        step = examples_per_step(self.config, self.args.world_size)
        # Packed rows are full whatever stands in them: then the order is free.
        lengths = [1 if self.config.packing else x.length for _, x in self.train_dataset]

        def epoch() -> int:
            return self.state.global_step // self.schedule.steps_per_epoch

        return SimilarLengths(lengths, step, self.config.seed, epoch)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        split = self.optimizer is not None  # under DeepSpeed this is called again with the first
        optimizer = super().create_optimizer(*args, **kwargs)
        ratio = self.net.adapter.lr_ratio
        if ratio == 1 or split:
            return optimizer
        adapters = (adapter for _, adapter in self.net.adapters())
        fast = {id(getattr(adapter, name)) for adapter in adapters for name in adapter.fast}
        for group in list(optimizer.param_groups):
            theirs = [p for p in group["params"] if id(p) in fast]
            if theirs:
                group["params"] = [p for p in group["params"] if id(p) not in fast]
                optimizer.add_param_group({**group, "params": theirs, "lr": group["lr"] * ratio})
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LambdaLR:
        # The optimiser's own rate is 1, so the factor is the rate; the Trainer saves the
        # scheduler with every checkpoint.
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, self.schedule.learning_rate
        )
        return self.lr_scheduler

    @property
    def is_sharded(self) -> bool:
        """Whether no process has all of the model."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def factors(self) -> dict[str, Tensor]:
        """All factors at full size, by site, in the main process at least; every process takes
        part, for they may be sharded."""
        if self.is_sharded:
            return self.net.named(self.accelerator.get_state_dict(self.model_wrapped) or {})
        return self.net.factor_state()

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Factors alone; of a sharded model they come in `state_dict`, gathered."""
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        state = self.net.factor_state() if state_dict is None else self.net.named(state_dict)
        if bad := [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]:
            what = f"{bad[0]} is not finite after an update"
            self._fail(self.state.global_step, what, self._visits[-1], [])
        save_file({name: tensor.cpu() for name, tensor in state.items()}, directory / FACTORS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: `fit` loads the factors before the model is wrapped and perhaps sharded."""


def frozen(net: Supernet) -> nn.Module:
    """The model as it computes now, sharing only what training leaves alone, in evaluation."""
    model = module_tree(net.model)
    for name, head in net.head.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(head.detach().clone()))
    for site, _ in net.adapters():
        layer = model.get_submodule(site)
        layer.adapter = copy.deepcopy(layer.adapter)
    return model.eval().requires_grad_(False)


def fit(
    net: Supernet,
    config: TrainConfig,
    schedule: Schedule,
    encoded: list[Encoded],
    run: Run,
    *,
    pad: int,
    only: SubAdapter | None = None,
    teacher: nn.Module | None = None,
    degree: float = 0.0,
    watched: Sequence[Encoded] = (),
) -> ElasticTrainer:
    """Run all stages on the encoded examples, resuming from a checkpoint of `run`; of what is cut
    a part `degree` is made up for.

    The losses of three sub-adapters are measured now and then on the `watched` examples.
    """
    folder = run.metrics.parent
    report_to, own_trackers = reporting(config.report_to, folder / "tensorboard")
    device = net.model.device
    arguments = arguments_of(net, config, schedule, run, report_to)
    probe = None
    if config.probe_steps and watched and not only:
        batch = {key: value.to(device) for key, value in collate(watched, pad).items()}
        probe = Probe(net, batch, config.probe_steps, config.seed, degree)

    def batch_of(numbered: Sequence[tuple[int, Encoded]]) -> dict[str, Tensor]:
        numbers, sequences = zip(*numbered, strict=True)
        made = pack if config.packing else collate
        return {**made(sequences, pad), "example": torch.tensor(numbers)}

    bar = Bar()
    for told in (None if only else schedule.closed(net.space), schedule.rising()):
        if told:
            say(f"Warning: {told}")
    with as_before(net.model):
        trainer = ElasticTrainer(
            net,
            config,
            schedule,
            only=only,
            teacher=teacher,
            degree=degree,
            probe=probe,
            args=arguments,
            train_dataset=list(enumerate(encoded)),
            data_collator=batch_of,
            callbacks=[checkpoints.MarkWhole(), MetricsFile(run.metrics), bar, *own_trackers],
        )
        trainer.remove_callback(PrinterCallback)
        checkpoint = checkpoints.newest(run.checkpoints)
        if checkpoint:
            say(f"Resuming from {checkpoint}")
            net.load_factors(read_factors(checkpoint))
        net.model.train()
        reported = trackers.beside_trainer(report_to, folder, str(arguments.run_name))
        with contextlib.closing(bar), reported:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    net.model.eval()
    return trainer
