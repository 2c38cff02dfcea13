"""One micro-batch of training on tensors without data: its operations and its memory.

A model of many blocks that are alike is measured with two of them and with three; what the third
one adds, every further one adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from elastic.data.answers import answer_logits, answer_loss
from elastic.models.meter import Meter
from elastic.spaces.bound import SubAdapter
from elastic.supernet.few import FEW, alike, without
from elastic.supernet.supernet import Supernet
from elastic.training.estimate import Batch
from elastic.training.fake_experts import one_expert


class MicroBatch(NamedTuple):
    """What a forward and a backward pass take."""

    flops: int
    saved: int
    """Bytes that the forward pass leaves for the backward pass."""
    peak: int
    """Bytes at the fullest moment, the saved ones among them."""


def rehearse(net: Supernet, sub: SubAdapter, batch: Batch, distill: float = 0.0) -> MicroBatch:
    """As `ElasticTrainer` computes it, after others have left gradients."""
    with net.active(sub), one_expert(net.model):
        kinds = alike(net.model)
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


def _train(net: Supernet, batch: Batch, distill: float, left_out: Sequence[str] = ()) -> MicroBatch:
    with without(net.model, left_out):
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
