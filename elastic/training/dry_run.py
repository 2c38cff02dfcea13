"""What training will need, found without weights.

The model is built from its configuration as torch's fake tensors, which have shape, type and device
but no memory, and micro-batches run on them. So nothing here knows how a layer computes.
"""

from __future__ import annotations

import itertools
from collections import Counter as Tally
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from elastic.adapters import METHODS, method_for
from elastic.config import StageConfig, TrainConfig
from elastic.data import load_task
from elastic.data.encoding import encode_all, padded
from elastic.data.vocabulary import token_order
from elastic.errors import ConfigError, DataMissing
from elastic.models import loading
from elastic.models.kinds import Kind, kind_of
from elastic.models.modules import modules_of, without_values
from elastic.models.quantised import packed_bytes
from elastic.models.wrappers import is_in, outside
from elastic.spaces.targets import sizes_of
from elastic.supernet.compensation import footprint
from elastic.supernet.discovery import require_fits, space_for
from elastic.supernet.moments import ROOM
from elastic.supernet.store import read_factors
from elastic.supernet.summary import sizes_table, vocabulary_told
from elastic.supernet.supernet import Supernet
from elastic.training.checks import predecessor, with_classes
from elastic.training.estimate import Batch, Compute, Estimate, Memory, Plan
from elastic.training.fake_step import rehearse
from elastic.training.one_task import kept_before
from elastic.training.schedule import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from elastic.run import Run
    from elastic.spaces.declared import SearchSpace


ASSUMED_LENGTH, ASSUMED_ANSWER = 512, 256
"""Tokens of the longest sequence, and of its answer, when the data cannot be read."""
VOCABULARIES = ("tokenizer.json", "*.model", "*.spm", "vocab.*", "tekken.json")
"""Files of which a tokenizer has one."""


def estimate(*runs: TrainConfig) -> Estimate:
    """Of one run, or of the runs of a sequence of tasks: memory and compute are those of the last,
    which carries the finished tasks."""
    config, notes, before = runs[-1], [], None
    try:
        config = with_classes(config)
    except DataMissing:
        notes.append("two classes assumed; name them with model.classes")
    if runs[0].start_from:
        before = predecessor(runs[0])
    space = space_for(config)
    if space.cuts_vocabulary:
        space = space.with_least(_tokens_that_stay(runs, space, before))
    device = loading.resolve_device(config.model.device)
    dtype = loading.resolve_dtype(config.model.dtype, device)
    if device.type != "cpu" and not torch.get_device_module(device).is_available():
        notes.append(f"no {device} here: kernels of the CPU, which may save more or less")
        device = torch.device("cpu")
    skeleton = loading.skeleton(config.model, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        # Made without data, not with it: some classes look at the values that they start with.
        model = without_values(skeleton, device)
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
        net.succeed(read_factors(before.super_adapter))
    with fake:
        for _ in runs[1:]:  # each ends with the factors that the next one carries
            for _, adapter in net.adapters():
                adapter.succeed(adapter.state_dict(), torch.Generator())
    require_fits(skeleton, space, config.adapter.rank)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    memory = Memory(base, _bytes(model) - dense, gradients, 2 * gradients)
    if net.space.vocabulary:
        notes.append(vocabulary_told(net.space, space.least))
    batch, examples = _data(runs, model)
    schedules = [Schedule.of(run, n) for run, n in zip(runs, examples, strict=bool(examples))]
    steps = sum(schedule.steps for schedule in schedules)
    plan = Plan(len(runs), sum(examples), len(config.resolved_stages), steps)
    compute = None
    try:
        with fake:
            memory, compute = _measure(net, config, batch, schedules, memory)
    except Exception as error:  # whatever a model's own code raises when it reads a value
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        notes.append(f"activations and compute unknown, {type(model).__name__} failed: {reason}")
    return Estimate(
        **vars(sizes_table(model, net.space)),
        parameters=parameters,
        dtype=str(dtype).removeprefix("torch."),
        method=config.adapter.resolved_method,
        trained=sum(parameter.numel() for parameter in trained),
        trained_by=_trained_by(net, [_shape(net, shapes, site) for site in net.space.targets]),
        batch=batch,
        accumulation=config.accumulation,
        plan=plan if examples else None,
        memory=memory,
        compute=compute,
        compensation=footprint(net.space, {name: shape[1] for name, shape in shapes.items()}, ROOM),
        device=device.type,
        notes=notes,
    )


def _tokens_that_stay(runs: Sequence[TrainConfig], space: SearchSpace, before: Run | None) -> int:
    """How many a vocabulary keeps for the answers of all runs, and of the one that they go on from;
    1 if they cannot be read."""
    config = runs[-1]
    skeleton, folder = loading.skeleton(config.model), loading.locate(config.model.path)
    if not _has_tokenizer(folder):
        return 1
    try:
        examples = [each for run in runs for each in load_task(run.task, run.seed).train]
    except DataMissing:
        return 1
    tokenizer = loading.load_tokenizer(config.model)
    encoded = encode_all(tokenizer, examples, skeleton)
    bound = space.bind(skeleton, config.adapter.rank)
    assert bound.vocabulary is not None
    return token_order(
        tokenizer, skeleton, examples, encoded, bound.vocabulary.choices[0],
        text=config.vocab.text, first=kept_before(before, bound),
    ).least  # fmt: skip


def _has_tokenizer(folder: str) -> bool:
    """transformers would make an empty one from the configuration alone."""
    return any(file for name in VOCABULARIES for file in Path(folder).glob(name))


def _data(runs: Sequence[TrainConfig], model: PreTrainedModel) -> tuple[Batch, list[int]]:
    """The largest micro-batch, and the examples of every run (none if the data is not there)."""
    config = runs[-1]
    answer = 0 if kind_of(model) is Kind.CLASSIFIER else ASSUMED_ANSWER
    assumed = Batch(config.batch_size, ASSUMED_LENGTH, answer)
    try:
        tasks = [load_task(run.task, run.seed).train for run in runs]
    except DataMissing as error:
        return replace(assumed, assumed=str(error)), []
    counts = [len(examples) for examples in tasks]
    sequences = min(config.batch_size, max(counts))
    folder = loading.locate(config.model.path, ["config.json"])
    if not _has_tokenizer(folder):
        return replace(assumed, sequences=sequences, assumed=f"{folder} has no tokenizer"), counts
    tokenizer = loading.load_tokenizer(replace(config.model, path=folder))
    encoded = encode_all(tokenizer, itertools.chain(*tasks), model)
    longest = max(len(one.source or one.ids) for one in encoded)
    return Batch(sequences, padded(longest), max(one.answer for one in encoded)), counts


def _measure(
    net: Supernet,
    config: TrainConfig,
    batch: Batch,
    schedules: Sequence[Schedule],
    memory: Memory,
) -> tuple[Memory, Compute]:
    """Memory and compute by running micro-batches of the maximal and the minimal sub-adapter."""
    largest = rehearse(net, net.space.maximal(), batch)
    # Training uses the whole head.
    smallest = rehearse(net, net.space.with_whole_vocabulary(net.space.minimal()), batch)
    # Nearly the maximal sub-adapter, which has no teacher, but taught by it.
    taught = largest
    if config.distill:
        taught = rehearse(net, net.space.maximal(), batch, config.distill)
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
        for schedule in schedules
        for stage in schedule.stages
    ]
    memory = replace(memory, activations=taught.saved, temporaries=taught.peak - taught.saved)
    whole = (sum(low for low, _ in spans), sum(high for _, high in spans)) if spans else None
    return memory, Compute(maximal, minimal, step(config.resolved_stages[-1]), whole)


def _shape(net: Supernet, linears: Mapping[str, torch.Size], site: str) -> tuple[int, ...]:
    """(out, in) of a linear layer, (experts, out, in) of a matrix of all experts."""
    mixture = net.space.experts_of(site)
    return sizes_of(mixture, site.rpartition(".")[2]) if mixture else tuple(linears[site])


def _trained_by(net: Supernet, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """Trained parameters on layers of these shapes and of the head, by method; those that do not
    fit are left out."""
    found: dict[str, int] = {}
    adapter = net.adapter
    head = sum(parameter.numel() for parameter in net.head.values())
    for name in METHODS:
        try:
            settings = replace(adapter, method=name)
        except ConfigError:
            continue
        methods = {shape: own for shape in shapes if (own := method_for(name, shape))}
        linear = (shape for shape in shapes if len(shape) == 2)
        if len(methods) < len({*shapes}) or any(METHODS[name].refuse(settings, *s) for s in linear):
            continue
        found[name] = head + sum(
            count * sum(
                parameter.numel()
                for parameter in methods[shape](settings, *shape, device="meta").parameters()
                if parameter.requires_grad
            )
            for shape, count in Tally(shapes).items()
        )  # fmt: skip
    return found


def _bytes(model: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _spared(model: PreTrainedModel, quantise: str) -> int:
    """Bytes that packing the weights of linear layers, the head's excepted, saves."""
    if quantise == "none":
        return 0
    head = model.get_output_embeddings()
    elsewhere = outside(model)
    layers = [
        layer
        for name, layer in modules_of(model, nn.Linear)
        if layer is not head and not is_in(name, elsewhere)
    ]
    return sum(
        layer.weight.nbytes - packed_bytes(quantise, *layer.weight.shape) for layer in layers
    )
