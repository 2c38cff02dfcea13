"""How much each group matters, from gradients: what a search may believe before it has seen
anything."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elastic.adapters.layers import ElasticLinear
from elastic.data.answers import answer_logits, answer_loss
from elastic.models.modules import evaluating, modules_of
from elastic.spaces.bound import Group
from elastic.supernet.depth import states
from elastic.supernet.expert_importance import experts_watched
from elastic.supernet.supernet import Supernet


def group_importance(net: Supernet, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """By group, the root mean square over examples of what the loss would change by, to first
    order, were that group alone cut to its smallest choice: √E[(Σ x · ∂L/∂x)²] over everything that
    would be gone (Molchanov et al. 2019, arXiv 1906.10771, with a gate per group instead of one
    per channel). For a rank, what would be gone is the part of the update behind it; for a depth,
    what the blocks add; of a mixture, what the experts or their channels behind it add for tokens
    as the full model sends them.

    `batches` have `input_ids`, `attention_mask`, `position_ids` and `labels`, (batch, length) each.
    """
    squares = dict.fromkeys((group.name for group in net.space), 0.0)
    changes: dict[str, Tensor] = {}
    examples = 0

    def gone(group: str, change: Tensor) -> None:
        """The products (batch, ..., features) of what would be gone from one layer."""
        each = change.flatten(1).sum(1, dtype=torch.float32).cpu()
        changes[group] = changes.get(group, 0.0) + each

    starts: list[Tensor] = []
    # An encoder and a decoder have modules of their own around one weight.
    shared = net.model.get_input_embeddings().weight
    handles = [
        module.register_forward_hook(lambda _m, _i, out: starts.append(out.requires_grad_()))
        for _, module in modules_of(net.model, nn.Embedding)
        if module.weight is shared
    ]
    for group in net.space:
        handles += _watched(net, group, functools.partial(gone, group.name))
        handles += experts_watched(net, group, functools.partial(gone, group.name), starts)
    try:
        with net.active(net.space.maximal()), evaluating(net.model):
            for batch in batches:
                logits, labels = answer_logits(net.model, batch)
                torch.autograd.grad(answer_loss(logits, labels), starts)
                for name, change in changes.items():
                    squares[name] += float(change.square().sum())
                examples += len(labels)
                changes.clear()
                starts.clear()
    finally:
        for handle in handles:
            handle.remove()
    found = {name: (total / examples) ** 0.5 for name, total in squares.items()}
    if net.space.vocabulary:  # of its kind the only one, with which it is compared
        found[net.space.vocabulary.name] = 1.0
    return found


def _watched(
    net: Supernet, group: Group, tell: Callable[[Tensor], None]
) -> Iterator[RemovableHandle]:
    """Hooks that tell what would be gone with this group as gradients come by."""
    for block in group.blocks[group.choices[-1] :]:
        yield net.model.get_submodule(block).register_forward_hook(
            lambda _block, inputs, given, output: _left_out(*states(inputs, given, output), tell),
            with_kwargs=True,
        )
    for cut in group.cuts:
        if cut.axis == "in":
            channels, device = group.choices[0] * cut.unit, net.model.device
            behind = torch.ones(channels, dtype=torch.bool, device=device)
            for start, length in cut.kept(group.choices[-1], group.choices[0]):
                behind[start : start + length] = False
            yield net.layer(cut.site).register_forward_pre_hook(
                lambda _layer, inputs, behind=behind: _channels(inputs[0], behind, tell)
            )
        elif cut.axis == "rank" and not net.space.experts_of(cut.site):
            yield net.layer(cut.site).register_forward_hook(
                lambda layer, inputs, y: _ranks(layer, inputs[0], y, group.choices[-1], tell)
            )


def _left_out(before: Tensor, after: Tensor, tell: Callable[[Tensor], None]) -> None:
    change = (after - before).detach()
    after.register_hook(lambda gradient: tell(change * gradient))


def _channels(x: Tensor, behind: Tensor, tell: Callable[[Tensor], None]) -> None:
    lost = x.detach()[..., behind]
    x.register_hook(lambda gradient: tell(lost * gradient[..., behind]))


def _ranks(
    layer: ElasticLinear, x: Tensor, y: Tensor, kept: int, tell: Callable[[Tensor], None]
) -> None:
    x, adapter = x.detach(), layer.adapter
    assert adapter is not None

    def hook(gradient: Tensor) -> None:
        with torch.no_grad():
            (A, B), (A_kept, B_kept) = (adapter.factors(rank) for rank in (adapter.max_rank, kept))
            update = x.to(A.dtype) @ A.T @ B.T - x.to(A.dtype) @ A_kept.T @ B_kept.T
            tell(update * gradient)

    y.register_hook(hook)
