"""Which channels and heads matter, and putting those first.

A sub-adapter keeps the leading channels of a group, so their order decides what is lost. On
SmolLM2 with half of its MLP cut and nothing trained, ordering by activation costs a few points,
ordering by weight norm destroys the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elastic.models.modules import modules_of
from elastic.spaces.bound import BoundSpace, Group
from elastic.spaces.dims import VOCABULARY, Cut, places
from elastic.spaces.mixtures import EXPERT_WIDTH
from elastic.supernet.depth import states
from elastic.supernet.expert_importance import Routed, expert_norms
from elastic.supernet.routed import told
from elastic.supernet.watching import Watching

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


@torch.no_grad()
def channel_order(
    model: nn.Module, space: BoundSpace, mode: str, batches: Iterable[dict[str, Tensor]] = ()
) -> dict[str, Tensor]:
    """Per group with cut channels, a permutation (full size,) of int64, most important first; one
    each, (parts, full size), where the parts of an axis have orders of their own. The order of a
    vocabulary is no question of the model's (`elastic.data.vocabulary`).

    activation: the importance of input channel c of a layer W is ‖x_c‖₂ · ‖W[:, c]‖₂, the size of
    its contribution to the output over the calibration batches (the score of Wanda, Sun et al.
    2023, arXiv 2306.11695, summed over a column); that of a block is 1 - cos(x, y) of its input and
    output, on average over tokens (Men et al. 2024, arXiv 2403.03853); that of an expert the norm
    of what it adds, its weight by the router included, summed over the tokens that are sent to it
    (REAP, Lasby et al. 2025, arXiv 2510.13999, takes the mean); that of a channel of an expert as
    of any channel, over those tokens and with that weight. norm: the summed L1 norm of the rows
    that make the channel, as NNCF reorders, or of all linear layers of a block, or of an expert's
    tensors. none: as they come. Blocks that stay are first. `batches` are keyword arguments of the
    model.
    """
    groups = [group for group in space if group.dim not in ("rank", VOCABULARY)]
    if mode == "none":
        scores = {group.name: blank(group) - torch.arange(group.choices[0]) for group in groups}
    elif mode == "norm":
        scores = {group.name: _norm_scores(model, group) for group in groups}
    else:
        scores = _activation_scores(model, groups, batches)
    for group in groups:
        scores[group.name][places(group.blocks)[: group.staying]] = torch.inf
    return {
        name: torch.argsort(score, descending=True, stable=True) for name, score in scores.items()
    }


def _columns(layer: nn.Module) -> int:
    """Of a linear layer, plain or elastic, at full size."""
    linear: Any = getattr(layer, "base", layer)
    return int(linear.in_features)


def _norm_scores(model: PreTrainedModel, group: Group) -> Tensor:
    total = blank(group)
    for cut in group.cuts:
        if cut.axis == "out":
            rows = model.get_submodule(cut.site).weight.double().abs().sum(1)
            total += _per_unit(rows, cut)
    for mixture in group.mixtures:
        total += expert_norms(model, mixture, group)
    for place, block in zip(places(group.blocks), group.blocks, strict=True):
        layers = modules_of(model.get_submodule(block), nn.Linear)
        total[place] = sum(float(layer.weight.double().abs().sum()) for _, layer in layers)
    return total


def _activation_scores(
    model: PreTrainedModel, groups: list[Group], batches: Iterable[dict[str, Tensor]]
) -> dict[str, Tensor]:
    reading = [(group, cut) for group in groups for cut in group.cuts if cut.axis == "in"]
    squares = {
        cut.site: torch.zeros(_columns(model.get_submodule(cut.site)), dtype=torch.float64)
        for _, cut in reading
    }
    changes = {block: (0.0, 0) for group in groups for block in group.blocks}
    watching = Watching(model)

    def add(site: str, x: Tensor) -> None:
        squares[site] += x.double().pow(2).sum(0).cpu()

    def watch_block(block: str) -> RemovableHandle:
        def hook(
            module: nn.Module, inputs: tuple[Any, ...], given: dict[str, Any], output: Any
        ) -> None:
            before, after = (
                watching.tokens(block, x.double()) for x in states(inputs, given, output)
            )
            total, seen = changes[block]
            change = 1 - torch.cosine_similarity(before, after)
            changes[block] = total + float(change.sum()), seen + len(change)

        return model.get_submodule(block).register_forward_hook(hook, with_kwargs=True)

    routed = Routed(model, groups)
    handles = [watch_block(block) for block in changes]
    try:
        with (
            watching.inputs({site: partial(add, site) for site in squares}),
            told(watching, routed.tell),
        ):
            for batch in batches:
                watching(batch)
    finally:
        for handle in handles:
            handle.remove()
    scores = {group.name: blank(group) for group in groups}
    for group, cut in reading:
        columns = model.get_submodule(cut.site).weight.double().pow(2).sum(0).cpu()
        scores[group.name] += _per_unit(squares[cut.site] * columns, cut)
    for group in groups:
        for mixture in group.mixtures:
            scores[group.name] += routed.scores(mixture, group)
        for place, block in zip(places(group.blocks), group.blocks, strict=True):
            total, seen = changes[block]
            scores[group.name][place] = total / max(seen, 1)
    return scores


def blank(group: Group) -> Tensor:
    """A score of 0 for every unit that is put in order."""
    full = group.choices[0]
    parts = [len(cut.parts) or 1 for cut in group.cuts[:1] if cut.apart]
    for mixture in group.mixtures[:1]:  # those of one choice are alike in this
        if group.dim == EXPERT_WIDTH:
            parts = [mixture.all_experts]
        elif mixture.groups > 1:
            parts = [mixture.groups]
    return torch.zeros(*parts, full, dtype=torch.float64)


def _per_unit(channels: Tensor, cut: Cut) -> Tensor:
    full = len(channels) // cut.unit
    parts = channels.cpu().split([full * part for part in cut.parts or (cut.unit,)])
    found = torch.stack([part.unflatten(0, (full, -1)).sum(1) for part in parts])
    return found if cut.apart else found.sum(0)
