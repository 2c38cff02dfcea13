"""One micro-batch of training on tensors without data: its operations and its memory.

A model of many blocks that are alike is measured with two of them and with three; what the third
one adds, every further one adds.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from elastic.adapters.layers import ElasticLinear
from elastic.data.answers import answer_logits, answer_loss
from elastic.models.meter import Meter
from elastic.models.modules import modules_of
from elastic.spaces.blocks import NUMBERS
from elastic.spaces.bound import SubAdapter
from elastic.supernet.depth import running
from elastic.supernet.supernet import Supernet
from elastic.training.estimate import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEW = 2
"""The first block is none of the rest: what enters it has no gradient."""


class MicroBatch(NamedTuple):
    """What a forward and a backward pass take."""

    flops: int
    saved: int
    """Bytes that the forward pass leaves for the backward pass."""
    peak: int
    """Bytes at the fullest moment, the saved ones among them."""


def rehearse(net: Supernet, sub: SubAdapter, batch: Batch, distill: float = 0.0) -> MicroBatch:
    """As `ElasticTrainer` computes it, after others have left gradients."""
    with net.active(sub):
        kinds = _alike(net.model)
        try:
            few = _train(net, batch, distill, left_out=[name for k in kinds for name in k[FEW:]])
            total = few
            for kind in kinds:
                others = [name for k in kinds if k != kind for name in k[FEW:]]
                more = _train(net, batch, distill, left_out=[*others, *kind[FEW + 1 :]])
                further = len(kind) - FEW
                total = MicroBatch(
                    *(t + further * (m - f) for t, m, f in zip(total, more, few, strict=True))
                )
            return total
        except (IndexError, KeyError):  # a model that looks for its blocks by number
            return _train(net, batch, distill)


def _alike(model: nn.Module) -> list[list[str]]:
    """Names of blocks in one list that compute the same, where they are many."""
    kinds: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    seen: list[str] = []
    for name, blocks in modules_of(model, nn.ModuleList):
        if any(name.startswith(f"{outer}.") for outer in seen):
            continue
        seen.append(name)
        for number, block in running(blocks).items():
            kinds[(name, *_signature(block))].append(f"{name}.{number}")
    return [kind for kind in kinds.values() if len(kind) > 2 * FEW + 1]


def _signature(block: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Classes, shapes, active sizes and plain settings of everything in a block, but its number."""
    for name, module in block.named_modules():
        settings: dict[str, Any] = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and key not in NUMBERS
        }
        if isinstance(module, ElasticLinear):
            size = module.size
            settings |= {"active": (size.rows, size.columns, size.rank)}
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        shapes = tuple((key, tensor.shape, tensor.dtype) for key, tensor in tensors)
        yield name, type(module), tuple(sorted(settings.items(), key=str)), shapes


@contextlib.contextmanager
def _without(model: PreTrainedModel, left_out: Sequence[str]) -> Iterator[None]:
    """The model as if these blocks were not there."""
    lists = {name.rpartition(".")[0] for name in left_out}
    whole = {name: model.get_submodule(name) for name in lists}
    for name, blocks in whole.items():
        own = running(blocks).items()
        kept = [block for number, block in own if f"{name}.{number}" not in left_out]
        model.set_submodule(name, nn.ModuleList(kept))
    try:
        yield
    finally:
        for name, blocks in whole.items():
            model.set_submodule(name, blocks)


def _train(net: Supernet, batch: Batch, distill: float, left_out: Sequence[str] = ()) -> MicroBatch:
    with _without(net.model, left_out):
        model = net.model.train()
        inputs = {key: tensor.to(model.device) for key, tensor in batch.tensors(model).items()}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in trained]
        given = (*model.parameters(), *model.buffers(), *gradients, *inputs.values())
        with Meter(given).recording() as meter:
            _loss(net, inputs, batch.answer, distill).backward()
    return MicroBatch(meter.flops, meter.saved, meter.peak)


def _loss(net: Supernet, inputs: dict[str, Tensor], answer: int, distill: float) -> Tensor:
    logits, labels = answer_logits(net.model, inputs, answer)
    teacher = None
    if distill:
        with torch.no_grad(), net.active(net.space.maximal()):
            teacher, _ = answer_logits(net.model, inputs, answer)
    kept = torch.arange(labels.numel(), device=labels.device)
    return answer_loss(logits, labels, teacher, distill, kept) / labels.numel()
