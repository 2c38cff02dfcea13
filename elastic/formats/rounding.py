"""A model that computes as its compressed graph will: weights rounded as NNCF stores them.

In modes that look at no examples every code is the nearest of its row or group, so what a graph
answers is known before there is one. Activations stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastic.formats.compression import GROUP, MODES, SMALLEST_GROUP
from elastic.models.wrappers import is_in, outside

KINDS = (nn.Linear, nn.Embedding)


@dataclass(frozen=True)
class Grid:
    """To what a weight (outputs, inputs) is rounded."""

    bits: int
    group: int | None = None
    """Neighbours in a row that share a scale; None: the whole row."""
    symmetric: bool = False
    """Around 0, without a zero point."""


def grids(model: PreTrainedModel, mode: str) -> dict[str, Grid]:
    """By the name of every layer whose weight is compressed, of tied ones the first.

    In 4-bit modes embeddings and the last layer of every graph get 8 bits, and so does a layer
    whose number of channels no group of `SMALLEST_GROUP` divides.
    """
    asked, symmetric = MODES[mode].bits, mode.endswith("_sym")
    found: dict[str, Grid] = {}
    seen: set[Tensor] = set()
    graphs = [model.get_encoder(), model] if model.config.is_encoder_decoder else [model]
    last = {[each for each in graph.modules() if isinstance(each, nn.Linear)][-1]
            for graph in graphs}  # fmt: skip
    elsewhere = outside(model)
    for name, module in model.named_modules():
        if not isinstance(module, KINDS) or module.weight in seen or is_in(name, elsewhere):
            continue
        seen.add(module.weight)
        channels = module.weight.shape[1]
        group = min(GROUP, channels & -channels)
        if asked == 8:
            found[name] = Grid(8, symmetric=symmetric)
        elif isinstance(module, nn.Embedding) or module in last or group < SMALLEST_GROUP:
            found[name] = Grid(8)
        else:
            found[name] = Grid(asked, group, symmetric)
    return found


@torch.no_grad()
def round_(model: PreTrainedModel, mode: str, runtime: str) -> PreTrainedModel:
    """New, rounded weights for every layer of `grids`; what the old ones were shared with keeps
    them, tied layers stay tied."""
    made: dict[Tensor, nn.Parameter] = {}
    for name, grid in grids(model, mode).items():
        weight = model.get_submodule(name).weight
        near = rounded(weight.float(), grid, half=runtime == "openvino").to(weight.dtype)
        made[weight] = nn.Parameter(near, requires_grad=False)
    for module in model.modules():
        if isinstance(module, KINDS) and module.weight in made:
            module.weight = made[module.weight]
    return model


def rounded(weight: Tensor, grid: Grid, *, half: bool = False) -> Tensor:
    """(outputs, inputs), each the nearest of 2^bits even steps of its row or group: from the
    smallest to the largest (both reach 0), or around 0 with the larger end at -2^(bits - 1).
    `half` scales are kept in float16, as OpenVINO does."""
    flat = weight.reshape(len(weight), -1, grid.group or weight.shape[1])
    low, high = flat.amin(-1, keepdim=True).clamp(max=0), flat.amax(-1, keepdim=True).clamp(min=0)
    if grid.symmetric:
        scale = torch.where(-low >= high, -low, -high) / 2 ** (grid.bits - 1)
        zero, first = torch.zeros_like(scale), -(2 ** (grid.bits - 1))
    else:
        scale = (high - low) / (2**grid.bits - 1)
        zero, first = -(low / scale.where(scale != 0, 1)).round(), 0
    codes = (
        (flat / scale.where(scale != 0, 1) + zero).round().clamp(first, first + 2**grid.bits - 1)
    )
    scale = scale.half().float() if half else scale
    return ((codes - zero) * scale).reshape(weight.shape)


def saved_bytes(model: PreTrainedModel, mode: str) -> int:
    """How much less codes, and a float32 scale and a zero point per row or group, take than weights
    as they are."""
    saved = 0
    for name, grid in grids(model, mode).items():
        weight = model.get_submodule(name).weight
        scales = weight.numel() // (grid.group or weight.shape[1])
        saved += weight.nbytes - (weight.numel() + scales) * grid.bits // 8 - 4 * scales
    return saved
