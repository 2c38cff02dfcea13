"""Layers of different sizes as layers of one size: the smaller ones filled up with zeros.

A channel of an MLP, or a head, whose column in the layer that reads it is zero adds exactly
nothing, whatever the activation makes of it. The model is of the family's own class and computes
the same, at the cost of the widest layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from elastic.formats import hf
from elastic.models.modules import module_tree, plain_linear
from elastic.spaces.bound import BoundSpace, SubAdapter
from elastic.spaces.dims import Ranges
from elastic.spaces.uniform import covering
from elastic.supernet.depth import renamed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@torch.no_grad()
def padded(model: PreTrainedModel, space: BoundSpace, sub: SubAdapter) -> PreTrainedModel:
    """A model of the same function whose layers have sizes that the class's own config can say.

    `model` is compact with the sizes of `sub`; it is left as it is, and what needs no padding is
    shared with it. Every kind of size becomes the largest that a layer has, or the full one
    where the family's config knows no other.
    """
    sub = space.check(sub)
    for larger in covering(space, sub):
        wider = _padded(model, space, sub, larger)
        if hf.is_plain(wider):
            return wider
    raise AssertionError("the base model's own sizes are those of its class")


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
    for group in space:
        for module, name in group.counted if sub[group.name] else ():
            setattr(wider.get_submodule(renamed(kept, module)), name, larger[group.name])
    return wider


def _channels(left: Ranges) -> Tensor:
    return torch.cat([torch.arange(start, start + length) for start, length in left])


def spread(tensor: Tensor, axis: int, places: Tensor, full: int) -> Tensor:
    """An axis of size `full` with what there is at these places, and zeros between."""
    shape = list(tensor.shape)
    shape[axis] = full
    return tensor.new_zeros(shape).index_copy_(axis, places.to(tensor.device), tensor)
