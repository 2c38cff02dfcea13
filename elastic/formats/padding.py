"""Layers of different sizes as layers of one size: the smaller ones filled up with zeros.

A channel of an MLP, or a head, whose column in the layer that reads it is zero adds exactly
nothing, whatever the activation makes of it. The model is of the family's own class and computes
the same, at the cost of the widest layer.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import nn

from elastic.formats import hf
from elastic.models.modules import module_tree, plain_linear
from elastic.spaces.bound import BoundSpace, SubAdapter
from elastic.spaces.dims import Ranges
from elastic.spaces.mixtures import EXPERT_WIDTH, EXPERTS
from elastic.spaces.uniform import covering
from elastic.supernet.depth import renamed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from elastic.spaces.mixtures import Mixture


@torch.no_grad()
def padded(model: PreTrainedModel, space: BoundSpace, sub: SubAdapter) -> PreTrainedModel:
    """A model of the same function whose layers have sizes that the class's own config can say.

    `model` is compact with the sizes of `sub`; it is left as it is, and what needs no padding is
    shared with it. Every kind of size becomes the largest that a layer has, or the full one
    where the family's config knows no other.
    """
    sub = space.check(sub)
    for larger in covering(space, sub):
        if why_not(space, sub, larger):
            continue
        wider = _padded(model, space, sub, larger)
        if hf.is_plain(wider):
            return wider
    raise AssertionError("the base model's own sizes are those of its class")


def why_not(space: BoundSpace, sub: SubAdapter, larger: SubAdapter | None = None) -> str | None:
    """Why what is missing, to the sizes of `larger` or else to one size in all blocks, cannot be
    filled up; None if it can."""
    if larger is None:
        larger = next(covering(space, sub))
    for group in space:
        if group.dim == EXPERTS and sub[group.name] not in (0, larger[group.name]):
            return (
                f"{group.name} keeps {sub[group.name]} experts, others keep {larger[group.name]}, "
                "and an expert of zeros would be chosen as others are: choose hf.uniform"
            )
    return None


def _padded(
    model: PreTrainedModel, space: BoundSpace, sub: SubAdapter, larger: SubAdapter
) -> PreTrainedModel:
    wider = module_tree(model)
    kept = space.kept(sub)
    for name, axis in space.axes:
        site = renamed(kept, name)
        if site is None:
            continue
        mine, theirs = (_channels(space.left(each, name, axis)) for each in (sub, larger))
        if len(mine) == len(theirs):
            continue
        places = torch.searchsorted(theirs, mine)
        layer = wider.get_submodule(site)
        weight, bias = layer.weight, layer.bias
        weight = spread(weight, int(axis == "in"), places, len(theirs))
        if bias is not None and axis == "out":
            bias = spread(bias, 0, places, len(theirs))
        wider.set_submodule(site, plain_linear(weight, bias))
    for name, (mixture, groups) in space.mixtures.items():
        width = groups.get(EXPERT_WIDTH)
        site = renamed(kept, name)
        if width and site and sub[width.name] != larger[width.name]:
            _widen(wider.get_submodule(site), mixture, sub[width.name], larger[width.name])
    for group in space:
        for module, name in group.counted if sub[group.name] else ():
            setattr(wider.get_submodule(renamed(kept, module)), name, larger[group.name])
    return wider


def _widen(experts: nn.Module, mixture: Mixture, width: int, wider: int) -> None:
    """Fill every expert up with channels of zeros, in place."""
    for axis in mixture.axes:
        if axis.of == "channels":
            starts = itertools.accumulate((wider * part for part in axis.parts), initial=0)
            places = [
                torch.arange(start, start + width * part)
                for start, part in zip(starts, axis.parts, strict=False)
            ]
            tensor = getattr(experts, axis.tensor)
            size = wider * sum(axis.parts)
            tensor = spread(tensor, axis.number, torch.cat(places), size)
            setattr(experts, axis.tensor, nn.Parameter(tensor, requires_grad=False))
    for _, name in mixture.measured:
        setattr(experts, name, wider)


def _channels(left: Ranges) -> Tensor:
    return torch.cat([torch.arange(start, start + length) for start, length in left])


def spread(tensor: Tensor, axis: int, places: Tensor, full: int) -> Tensor:
    """An axis of size `full` with what there is at these places, and zeros between."""
    shape = list(tensor.shape)
    shape[axis] = full
    return tensor.new_zeros(shape).index_copy_(axis, places.to(tensor.device), tensor)
