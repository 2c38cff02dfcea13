"""Which channels and heads matter, and putting those first.

A sub-adapter keeps the leading channels of a group, so their order decides what is lost. On
SmolLM2 with half of its MLP cut and nothing trained, ordering by activation costs a few points,
ordering by weight norm destroys the model.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from elastic.batching import IGNORED
from elastic.classifier import classes_of
from elastic.dims import Cut
from elastic.space import BoundSpace, Group


@torch.no_grad()
def channel_order(
    model: nn.Module, space: BoundSpace, mode: str, batches: Iterable[dict[str, Tensor]] = ()
) -> dict[str, Tensor]:
    """Per group with cut channels, a permutation (full size,) of int64, most important first.

    activation: the importance of input channel c of a layer W is ‖x_c‖₂ · ‖W[:, c]‖₂, the size of
    its contribution to the output over the calibration batches (the score of Wanda, Sun et al.
    2023, arXiv 2306.11695, summed over a column). norm: the summed L1 norm of the rows that make
    the channel, as NNCF reorders. none: as they come. `batches` are keyword arguments of the model.
    """
    groups = [group for group in space if group.dim != "rank"]
    if mode == "none":
        scores = {group.name: -torch.arange(group.choices[0]).double() for group in groups}
    elif mode == "norm":
        scores = {group.name: _norm_scores(model, group) for group in groups}
    else:
        scores = _activation_scores(model, groups, batches)
    return {
        name: torch.argsort(score, descending=True, stable=True) for name, score in scores.items()
    }


def _norm_scores(model: nn.Module, group: Group) -> Tensor:
    total = torch.zeros(group.choices[0], dtype=torch.float64)
    for cut in group.cuts:
        if cut.axis == "out":
            rows = model.get_submodule(cut.site).weight.double().abs().sum(1)
            total += _per_unit(rows, cut)
    return total


def _activation_scores(
    model: nn.Module, groups: list[Group], batches: Iterable[dict[str, Tensor]]
) -> dict[str, Tensor]:
    sites = {cut.site: (group, cut) for group in groups for cut in group.cuts if cut.axis == "in"}
    squares = {
        site: torch.zeros(model.get_submodule(site).in_features, dtype=torch.float64)
        for site in sites
    }

    def watch(site: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].double().flatten(0, -2)
            in_decoder = model.config.is_encoder_decoder and "decoder" in site.split(".")
            real = answer if in_decoder else prompt
            squares[site] += (x if real is None else x[real]).pow(2).sum(0).cpu()

        return model.get_submodule(site).register_forward_pre_hook(hook)

    # What padding computes is noise, and how much there is depends on the batch.
    prompt: Tensor | None = None
    answer: Tensor | None = None
    handles = [watch(site) for site in sites]
    try:
        for batch in batches:
            prompt = batch["attention_mask"].flatten().bool() if "attention_mask" in batch else None
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            if model.config.is_encoder_decoder:
                answer = batch["labels"].flatten() != IGNORED
                model(**batch, use_cache=False)
            elif classes_of(model):
                model(**inputs)
            else:
                model(**inputs, logits_to_keep=1, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    scores = {group.name: torch.zeros(group.choices[0], dtype=torch.float64) for group in groups}
    for site, (group, cut) in sites.items():
        columns = model.get_submodule(site).weight.double().pow(2).sum(0).cpu()
        scores[group.name] += _per_unit(squares[site] * columns, cut)
    return scores


def _per_unit(channels: Tensor, cut: Cut) -> Tensor:
    full = len(channels) // cut.unit
    parts = channels.cpu().split([full * part for part in cut.parts or (cut.unit,)])
    return sum(part.unflatten(0, (full, -1)).sum(1) for part in parts)


def channel_index(order: Tensor, cut: Cut) -> Tensor:
    """The permutation of the channels of an axis, (n * unit,), that moves whole units, in each part
    of a fused layer alike, in this order (n,)."""
    found, start = [], 0
    for part in cut.parts or (cut.unit,):
        found.append(start + (order[:, None] * part + torch.arange(part)).flatten())
        start += part * len(order)
    return torch.cat(found)
