"""How much each group matters, from gradients: what a search may believe before it has seen
anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elastic.adapters.attach import ElasticLinear, modules_of
from elastic.batching import answer_logits
from elastic.loss import answer_loss
from elastic.space import Group
from elastic.supernet import Supernet


def sensitivity(net: Supernet, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """By group, the root mean square over examples of what the loss would change by, to first
    order, were that group alone cut to its smallest choice: √E[(Σ x · ∂L/∂x)²] over everything that
    would be gone (Molchanov et al. 2019, arXiv 1906.10771, with a gate per group instead of one
    per channel). For a rank, what would be gone is the part of the update behind it.

    `batches` have `input_ids`, `attention_mask`, `position_ids` and `labels`, (batch, length) each.
    """
    squares = dict.fromkeys((group.name for group in net.space), 0.0)
    changes: dict[str, Tensor] = {}
    examples = 0

    def gone(group: Group, change: Tensor) -> None:
        """The products (batch, ..., features) of what would be gone from one layer."""
        each = change.flatten(1).sum(1, dtype=torch.float32).cpu()
        changes[group.name] = changes.get(group.name, 0.0) + each

    starts: list[Tensor] = []
    # An encoder and a decoder have modules of their own around one weight.
    shared = net.model.get_input_embeddings().weight
    handles = [
        module.register_forward_hook(lambda _m, _i, out: starts.append(out.requires_grad_()))
        for _, module in modules_of(net.model, nn.Embedding)
        if module.weight is shared
    ]
    for group in net.space:
        handles += _watched(net, group, gone)
    try:
        with net.active(net.space.maximal()):
            for batch in batches:
                logits, labels = answer_logits(net.model, batch)
                torch.autograd.grad(answer_loss(logits, labels), starts)
                for name, change in changes.items():
                    squares[name] += float(change.square().sum())
                examples += len(labels)
                changes.clear(), starts.clear()
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / examples) ** 0.5 for name, total in squares.items()}


def _watched(
    net: Supernet, group: Group, gone: Callable[[Group, Tensor], None]
) -> Iterator[RemovableHandle]:
    """Hooks that tell `gone` about this group as gradients come by."""
    for cut in group.cuts:
        kept = group.choices[-1] * cut.unit
        if cut.axis == "in":
            yield net.layer(cut.site).register_forward_pre_hook(
                lambda _layer, inputs, kept=kept: _channels(
                    inputs[0], kept, lambda change: gone(group, change)
                )
            )
        elif cut.axis == "rank":
            yield net.layer(cut.site).register_forward_hook(
                lambda layer, inputs, output, kept=kept: _ranks(
                    layer, inputs[0], output, kept, lambda change: gone(group, change)
                )
            )


def _channels(x: Tensor, kept: int, tell: Callable[[Tensor], None]) -> None:
    behind = x.detach()[..., kept:]
    x.register_hook(lambda gradient: tell(behind * gradient[..., kept:]))


def _ranks(
    layer: ElasticLinear, x: Tensor, y: Tensor, kept: int, tell: Callable[[Tensor], None]
) -> None:
    x = x.detach()

    def hook(gradient: Tensor) -> None:
        with torch.no_grad():
            (A, B), (A_kept, B_kept) = (
                layer.adapter.factors(rank) for rank in (layer.adapter.max_rank, kept)
            )
            update = x.to(A.dtype) @ A.T @ B.T - x.to(A.dtype) @ A_kept.T @ B_kept.T
            tell(update * gradient)

    y.register_hook(hook)
