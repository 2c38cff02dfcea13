"""What training will need, found without weights: one micro-batch on tensors without data.

The model is built from its configuration as torch's fake tensors, which have shape, type and device
but no memory, and one training step runs on them. So nothing here knows how a layer computes.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter as Tally
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from elastic import models
from elastic.adapters import METHODS
from elastic.adapters.attach import modules_of
from elastic.batching import Encoded, answer_logits, collate, encode_all, padded
from elastic.config import AdapterConfig, StageConfig, TrainConfig
from elastic.cost import Cost, Counter
from elastic.errors import ConfigError, DataMissing
from elastic.loss import answer_loss
from elastic.meter import Meter
from elastic.quantised import packed_bytes
from elastic.run import predecessor
from elastic.schedule import Schedule
from elastic.space import BoundSpace, SearchSpace, SubAdapter
from elastic.supernet import Supernet, read_tensors
from elastic.tasks import load_task

ASSUMED_LENGTH, ASSUMED_ANSWER = 512, 256
"""Tokens of the longest sequence, and of its answer, when the data cannot be read."""
VOCABULARIES = ("tokenizer.json", "*.model", "*.spm", "vocab.*", "tekken.json")
"""Files of which a tokenizer has one."""


@dataclass(frozen=True)
class Choices:
    """Groups of one name, in all blocks, with the same choices."""

    name: str
    dim: str
    groups: int
    choices: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch: every sequence as long as the longest."""

    sequences: int
    length: int
    """Tokens, padded; of the prompt alone for an encoder-decoder model."""
    answer: int
    """Tokens that have logits."""
    assumed: str = ""
    """Why the lengths could not be read from the data; empty if they were."""

    def tensors(self, encoder_decoder: bool) -> dict[str, Tensor]:
        """As training collates them, int64."""
        row = Encoded((0,) * self.length, self.answer)
        if encoder_decoder:
            row = Encoded((0,) * self.answer, self.answer, (0,) * self.length)
        return collate([row] * self.sequences, pad=0)


@dataclass(frozen=True)
class Plan:
    """How long training takes."""

    tasks: int
    examples: int
    stages: int
    steps: int
    """Optimiser steps of all tasks and stages."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the fullest moment of a micro-batch of the maximal sub-adapter, in one process;
    without what the device's libraries take for themselves. None is unknown."""

    base: int
    factors: int
    gradients: int
    moments: int
    """Adam's two."""
    activations: int | None = None
    """What the forward pass saves for the backward pass, beside weights."""
    temporaries: int | None = None
    """Logits, their gradients and whatever else lives beside the activations."""

    @property
    def total(self) -> int | None:
        if self.activations is None or self.temporaries is None:
            return None
        return sum(vars(self).values())


@dataclass(frozen=True)
class Compute:
    """Floating-point operations, forward and backward. The regulariser and the optimiser are not
    counted."""

    maximal: int
    """Of one micro-batch of the maximal sub-adapter."""
    minimal: int
    step: tuple[int, int]
    """From, to: an optimiser step of the last stage, as its sub-adapters happen to be drawn."""
    run: tuple[int, int] | None
    """From, to: all steps, were every batch the largest; None if their number is unknown."""


@dataclass(frozen=True)
class Estimate:
    """What `elastic train --dry_run` found."""

    architecture: str
    parameters: int
    dtype: str
    space: Sequence[Choices]
    sub_adapters: int
    method: str
    trained: int
    """Parameters that training changes."""
    trained_by: Mapping[str, int]
    """The same for a single task, with every method that fits model and rank."""
    costs: Mapping[str, Cost]
    """Of the maximal, heuristic and minimal sub-adapter, merged."""
    batch: Batch
    accumulation: int
    plan: Plan | None
    """None if the data is not there."""
    memory: Memory
    compute: Compute | None
    device: str
    """Whose kernels memory and compute belong to."""
    notes: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        plain = {**asdict(self), "sub_adapters": str(self.sub_adapters)}
        plain["memory"]["total"] = self.memory.total
        return plain

    def show(self) -> None:
        from rich.console import Console

        console = Console(width=max(100, Console().width))
        for table in self._tables():
            console.print(table)
        for line in self._lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        print(json.dumps(self.as_dict()))

    def _tables(self) -> list:
        from rich.table import Table

        space = Table("group", "dimension", "groups", "choices",
                      title=f"{self.sub_adapters:.1e} sub-adapters")  # fmt: skip
        for row in self.space:
            space.add_row(row.name, row.dim, str(row.groups), ", ".join(map(str, row.choices)))
        costs = Table("", "parameters", "MACs per token", title="Sub-adapters once merged")
        for name, cost in self.costs.items():
            costs.add_row(name, f"{cost.params:,}", _short(cost.macs))
        memory = Table("", "bytes", title=f"Memory of one micro-batch ({self.device})")
        for name, size in {**vars(self.memory), "total": self.memory.total}.items():
            memory.add_row(name, _short(size, "B"), end_section=name == "temporaries")
        for table, first in ((space, 2), (costs, 1), (memory, 1)):
            for column in table.columns[first : first + 2]:
                column.justify = "right" if column.header != "choices" else "left"
        return [space, costs, memory]

    def _lines(self) -> list[str]:
        batch, plan, compute = self.batch, self.plan, self.compute
        methods = ", ".join(f"{name} {count:,}" for name, count in self.trained_by.items())
        whole = ""
        if compute and compute.run:
            whole = f"; {_span(compute.run)} in all, were every batch so long"
        lines = [
            f"Base: {self.architecture}, {self.parameters:,} parameters, {self.dtype}",
            f"Trained: {self.trained:,} parameters with {self.method}; one task at this rank by "
            f"method: {methods}",
            f"Micro-batch: {batch.sequences} sequences of {batch.length} tokens, {batch.answer} of "
            "the answer" + (f"; assumed, since {batch.assumed}" if batch.assumed else ""),
        ]
        if plan:
            tasks = f"{plan.tasks} tasks, " if plan.tasks > 1 else ""
            lines.append(
                f"Training: {tasks}{plan.examples} examples, {plan.stages} stages, {plan.steps} "
                f"steps of {self.accumulation} micro-batches"
            )
        if compute:
            lines.append(
                f"Compute: {_short(compute.maximal, 'FLOP')} per micro-batch maximal, "
                f"{_short(compute.minimal, 'FLOP')} minimal; {_span(compute.step)} per step{whole}"
            )
        return lines + [f"Note: {note}" for note in self.notes]


def estimate(*runs: TrainConfig) -> Estimate:
    """Of one run, or of the runs of a sequence of tasks: memory and compute are those of the last,
    which carries the finished tasks."""
    config, notes, before = runs[-1], [], None
    if runs[0].start_from:
        before = predecessor(runs[0])
    space = SearchSpace.load(config.space)
    device = models.resolve_device(config.model.device)
    dtype = models.resolve_dtype(config.model.dtype, device)
    if device.type != "cpu" and not torch.get_device_module(device).is_available():
        notes.append(f"no {device} here: kernels of the CPU, which may save more or less")
        device = torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model = models.skeleton(config.model, dtype, device)
        parameters = sum(p.numel() for p in model.parameters())
        base = _bytes(model) - _spared(model, config.model.quantise)
        shapes = {name: layer.weight.shape for name, layer in modules_of(model, nn.Linear)}
        dense = _bytes(model)
        net = Supernet(model, space, config.adapter, start=False)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.model.quantise != "none":
        notes.append("temporaries and compute are those of a base that is not quantised")
    if before:
        net.succeed(read_tensors(before.super_adapter)[1])
    with fake:
        for _ in runs[1:]:  # each ends with the factors that the next one carries
            for _, adapter in net.adapters():
                adapter.succeed(adapter.state_dict(), torch.Generator())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    memory = Memory(base, _bytes(model) - dense, gradients, 2 * gradients)
    batch, examples = _data(runs, model.config.is_encoder_decoder)
    compute = None
    try:
        with fake:
            memory, compute = _measure(net, runs, batch, examples, memory)
    except Exception as error:  # whatever a model's own code raises when it reads a value
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        notes.append(f"activations and compute unknown, {type(model).__name__} failed: {reason}")
    cost = Counter(model, net.space)
    return Estimate(
        architecture=type(model).__name__,
        parameters=parameters,
        dtype=str(dtype).removeprefix("torch."),
        space=_choices(net.space),
        sub_adapters=net.space.size,
        method=config.adapter.resolved_method,
        trained=sum(parameter.numel() for parameter in trained),
        trained_by=_trained_by(config.adapter, [shapes[site] for site in net.space.targets]),
        costs={name: cost(net.space.named(name)) for name in ("maximal", "heuristic", "minimal")},
        batch=batch,
        accumulation=config.accumulation,
        plan=_plan(runs, examples) if examples else None,
        memory=memory,
        compute=compute,
        device=device.type,
        notes=notes,
    )


def _data(runs: Sequence[TrainConfig], encoder_decoder: bool) -> tuple[Batch, list[int]]:
    """The largest micro-batch, and the examples of every run (none if the data is not there)."""
    config = runs[-1]
    assumed = Batch(config.batch_size, ASSUMED_LENGTH, ASSUMED_ANSWER)
    try:
        tasks = [load_task(run.task, run.seed).train for run in runs]
    except DataMissing as error:
        return replace(assumed, assumed=str(error)), []
    counts = [len(examples) for examples in tasks]
    sequences = min(config.batch_size, max(counts))
    folder = models.locate(config.model.path, ["config.json"])
    # transformers would make an empty tokenizer from the configuration alone.
    if not any(file for name in VOCABULARIES for file in Path(folder).glob(name)):
        return replace(assumed, sequences=sequences, assumed=f"{folder} has no tokenizer"), counts
    tokenizer = models.load_tokenizer(replace(config.model, path=folder))
    encoded = encode_all(tokenizer, itertools.chain(*tasks), encoder_decoder)
    longest = max(len(one.source or one.ids) for one in encoded)
    return Batch(sequences, padded(longest), max(one.answer for one in encoded)), counts


def _plan(runs: Sequence[TrainConfig], examples: Sequence[int]) -> Plan:
    steps = sum(schedule.steps for schedule in _schedules(runs, examples))
    return Plan(len(runs), sum(examples), len(runs[-1].resolved_stages), steps)


def _schedules(runs: Sequence[TrainConfig], examples: Sequence[int]) -> list[Schedule]:
    return [Schedule.of(run, count) for run, count in zip(runs, examples, strict=True)]


def _measure(
    net: Supernet,
    runs: Sequence[TrainConfig],
    batch: Batch,
    examples: Sequence[int],
    memory: Memory,
) -> tuple[Memory, Compute]:
    """Memory and compute by running micro-batches of the maximal and the minimal sub-adapter."""
    config = runs[-1]
    largest = _train(net, net.space.maximal(), batch)
    smallest = _train(net, net.space.minimal(), batch)
    # Nearly the maximal sub-adapter, which has no teacher, but taught by it.
    taught = _train(net, net.space.maximal(), batch, config.distill) if config.distill else largest
    teacher = taught.flops - largest.flops
    maximal, minimal = largest.flops, smallest.flops

    def step(stage: StageConfig) -> tuple[int, int]:
        if not stage.train_dims:
            low = high = maximal
        elif config.sampling == "sandwich":  # the maximal one of the three is the teacher
            low, high = maximal + 2 * minimal, 2 * maximal + minimal
        else:
            low, high = min(maximal, minimal + teacher), maximal + teacher
        return low * config.accumulation, high * config.accumulation

    spans = [
        [stage.epochs * schedule.steps_per_epoch * flops for flops in step(stage)]
        for schedule in _schedules(runs, examples)
        for stage in schedule.stages
    ] if examples else []  # fmt: skip
    memory = replace(memory, activations=taught.saved, temporaries=taught.peak - taught.saved)
    whole = (sum(low for low, _ in spans), sum(high for _, high in spans)) if spans else None
    return memory, Compute(maximal, minimal, step(config.resolved_stages[-1]), whole)


def _train(net: Supernet, sub: SubAdapter, batch: Batch, distill: float = 0.0) -> Meter:
    """One micro-batch, as `ElasticTrainer` computes it, after others have left gradients."""
    model = net.model.train()
    inputs = batch.tensors(model.config.is_encoder_decoder)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    def loss() -> Tensor:
        logits, labels = answer_logits(model, inputs, batch.answer)
        teacher = None
        if distill:
            with torch.no_grad(), net.active(net.space.maximal()):
                teacher, _ = answer_logits(model, inputs, batch.answer)
        kept = torch.arange(labels.numel(), device=labels.device)
        return answer_loss(logits, labels, teacher, distill, kept) / labels.numel()

    given = (*model.parameters(), *model.buffers(), *gradients, *inputs.values())
    with net.active(sub), Meter(given).recording() as meter:
        loss().backward()
    return meter


def _choices(space: BoundSpace) -> list[Choices]:
    kinds = Tally((g.name.rpartition(".")[2], g.dim, g.choices) for g in space)
    return [Choices(name, dim, n, choices) for (name, dim, choices), n in kinds.items()]


def _trained_by(adapter: AdapterConfig, shapes: Sequence[torch.Size]) -> dict[str, int]:
    """Trained parameters on layers of these shapes, by method; those that do not fit are left
    out."""
    found = {}
    for name, method in METHODS.items():
        try:
            settings = replace(adapter, method=name)
        except ConfigError:
            continue
        if any(method.refuse(settings, *shape) for shape in shapes):
            continue
        found[name] = sum(
            count * sum(
                parameter.numel()
                for parameter in method(settings, *shape, device="meta").parameters()
                if parameter.requires_grad
            )
            for shape, count in Tally(shapes).items()
        )  # fmt: skip
    return found


def _bytes(model: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _spared(model: nn.Module, quantise: str) -> int:
    """Bytes that packing the weights of linear layers, the head's excepted, saves."""
    if quantise == "none":
        return 0
    head = model.get_output_embeddings()
    layers = [layer for _, layer in modules_of(model, nn.Linear) if layer is not head]
    return sum(
        layer.weight.nbytes - packed_bytes(quantise, *layer.weight.shape) for layer in layers
    )


def _short(number: float | None, unit: str = "") -> str:
    """Three digits and a prefix: 13.5 GB."""
    if number is None:
        return "unknown"
    prefixes = iter(("", "k", "M", "G", "T", "P", "E"))
    prefix = next(prefixes)
    while number >= 999.5:
        number, prefix = number / 1000, next(prefixes)
    return f"{number:.3g} {prefix}{unit}"


def _span(flops: tuple[int, int]) -> str:
    low, high = (_short(number, "FLOP") for number in flops)
    return low if low == high else f"{low} to {high}"
