"""A model that computes as its compressed graph will: weights rounded as NNCF stores them.

In modes that look at no examples every code is the nearest of its row or group, so what a graph
answers is known before there is one. Activations stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastic.formats.compression import GROUP, MODES, SMALLEST_GROUP
from elastic.models.modules import put_
from elastic.models.wrappers import is_in, outside
from elastic.spaces.mixtures import mixtures

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
    """By the name of every layer whose weight is compressed, of tied ones the first; experts, and
    what chooses among them, by the names of their tensors.

    In 4-bit modes embeddings and the last layer of every graph get 8 bits, and so does a layer
    whose number of channels no group of `SMALLEST_GROUP` divides.
    """
    found = _grids(model, mode)
    return {name.removesuffix(".weight"): grid for name, grid in found.items()}


def _grids(model: PreTrainedModel, mode: str) -> dict[str, Grid]:
    """By the name of the weight."""
    asked, symmetric = MODES[mode].bits, mode.endswith("_sym")
    found: dict[str, Grid] = {}
    seen: set[Tensor] = set()
    graphs = [model.get_encoder(), model] if model.config.is_encoder_decoder else [model]
    last = {[each for each in graph.modules() if isinstance(each, nn.Linear)][-1]
            for graph in graphs}  # fmt: skip
    for name, weight in _weights(model):
        if weight in seen:
            continue
        seen.add(weight)
        module = model.get_submodule(name.rpartition(".")[0])
        channels = _rows(model, name).shape[1]
        group = min(GROUP, channels & -channels)
        if asked == 8:
            found[name] = Grid(8, symmetric=symmetric)
        elif isinstance(module, nn.Embedding) or module in last or group < SMALLEST_GROUP:
            found[name] = Grid(8)
        else:
            found[name] = Grid(asked, group, symmetric)
    return found


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Of layers, and of experts and what chooses among them, in the order of their modules."""
    experts, elsewhere = set(), outside(model)
    for mixture in mixtures(model):
        matrices = (held.name for held in mixture.tensors if len(held.shape) == 3)
        experts |= {f"{mixture.experts}.{name}" for name in matrices}
        rows = (row for row in mixture.rows if len(row.shape) == 2 and row.is_parameter)
        experts |= {f"{mixture.router}.{row.name}" for row in rows}
    for name, module in model.named_modules():
        if is_in(name, elsewhere):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if (leaf == "weight" and isinstance(module, KINDS)) or f"{name}.{leaf}" in experts:
                yield f"{name}.{leaf}", parameter


def _rows(model: PreTrainedModel, name: str) -> Tensor:
    """A weight as (outputs, inputs), of all experts one under another."""
    site, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(site)
    weight: Tensor = getattr(module, leaf)
    if weight.dim() == 3:
        weight = weight.transpose(1, 2) if module.is_transposed else weight
    return weight.flatten(0, -2)


@torch.no_grad()
def round_(model: PreTrainedModel, mode: str, runtime: str) -> PreTrainedModel:
    """New, rounded weights for every layer of `grids`; what the old ones were shared with keeps
    them, tied layers stay tied."""
    made: dict[Tensor, nn.Parameter] = {}
    for name, grid in _grids(model, mode).items():
        site, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(site)
        weight, rows = getattr(module, leaf), _rows(model, name)
        near = rounded(rows.float(), grid, half=runtime == "openvino").to(weight.dtype)
        if weight.dim() == 3:
            near = near.view(len(weight), -1, near.shape[1])
            near = near.transpose(1, 2).contiguous() if module.is_transposed else near
        made[weight] = nn.Parameter(near, requires_grad=False)
    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        if weight in made:
            put_(model, name, made[weight])
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
    for name, grid in _grids(model, mode).items():
        weight = _rows(model, name)
        scales = weight.numel() // (grid.group or weight.shape[1])
        saved += weight.nbytes - (weight.numel() + scales) * grid.bits // 8 - 4 * scales
    return saved
