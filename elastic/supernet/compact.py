"""From the active part of a supernet to a small model of plain layers: sliced, merged, or made one
tensor at a time from base weights that stay on disk.

A model loaded in the type it was saved in is mapped into memory, not read: its pages come and go.
What is cut of a tensor, permuted and merged exists from when it is asked for until it is written,
so a compact model can be written by a machine that holds neither it nor its base."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from elastic.adapters.layers import ElasticLinear, FactorLinear, Size
from elastic.models.modules import (
    dequantise_,
    module_tree,
    modules_of,
    plain_linear,
)
from elastic.spaces.bound import SubAdapter
from elastic.supernet.depth import original, settle_
from elastic.supernet.supernet import Supernet


@torch.no_grad()
def sliced(net: Supernet, sub: SubAdapter, degree: float = 0.0) -> PreTrainedModel:
    """A new model with `sub`'s sizes, its factors beside the weights (unmerged); a part `degree` of
    what is cut is made up for.

    Elastic layers are copied; everything else (embeddings, norms, uncut layers' biases) is shared
    with the supernet, which must not change while the slice is in use. Ties stay ties. Quantised
    weights become dense, in the type they are computed in.
    """
    sub = net.space.check(sub)
    left_out = net.space.left_out(sub)
    with net.active(sub, degree):
        model = module_tree(net.model)
        for site, layer in modules_of(net.model, ElasticLinear):
            if site.startswith(left_out):
                continue
            weight = layer.weight.clone(memory_format=torch.contiguous_format)
            bias = None if layer.bias is None else layer.bias.clone()
            factors = layer.factors()
            if factors is None:
                small = plain_linear(weight, bias)
            else:
                A, B = (factor.clone(memory_format=torch.contiguous_format) for factor in factors)
                small = FactorLinear(weight, bias, A, B)
            model.set_submodule(site, small)
    return dequantise_(settle_(model)).eval()


@torch.no_grad()
def merge_(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every factor layer of a sliced model by a plain linear with weight W + B A, in place.

    Update and sum are formed in float32 (float64 for a float64 model) and cast once, so the error
    is half a unit in the last place of the weight's type.
    """
    for site, layer in modules_of(model, FactorLinear):
        merged = merged_weight(layer.weight, layer.A, layer.B)
        bias = None if layer.bias is None else layer.bias.data
        model.set_submodule(site, plain_linear(merged, bias))
    return model


def merged_weight(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """weight + B A, (out, in), formed in float32 (float64 if it is) and rounded once."""
    wide = wide_type(weight)
    return torch.addmm(weight.to(wide), B.to(wide), A.to(wide)).to(weight.dtype)


def compact(net: Supernet, sub: SubAdapter, degree: float = 0.0) -> PreTrainedModel:
    """`sub` as a model of plain linear layers: sliced, then merged."""
    return merge_(sliced(net, sub, degree))


def wide_type(tensor: Tensor) -> torch.dtype:
    """The type that a weight and its update are added in."""
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True)
class Streamed:
    """A compact model, each of whose tensors is made whenever it is asked for."""

    model: PreTrainedModel
    """Its modules and sizes, without data (meta)."""
    tensors: Mapping[str, Callable[[], Tensor]]
    """By the name that the state of the model has for it."""


def streamed(
    base: PreTrainedModel,
    net: Supernet,
    sub: SubAdapter,
    head: Mapping[str, Tensor] | None = None,
    degree: float = 0.0,
) -> Streamed:
    """What `compact` would give, bit for bit.

    `net` is the super-adapter's supernet over a model without data (meta), with its order and its
    factors; `base` has the weights, in their own order; `head` what was trained of a classifier's.
    """
    head = head or {}
    sub = net.space.check(sub)
    model = sliced(net, sub, degree)
    updates = {}
    for site, layer in modules_of(model, FactorLinear):
        updates[site] = layer.A.data, layer.B.data
        bias = None if layer.bias is None else layer.bias.data
        model.set_submodule(site, plain_linear(layer.weight.data, bias))
    left, kept = _left(net, sub, degree), net.space.kept(sub)

    def made(name: str) -> Tensor:
        site, _, leaf = name.rpartition(".")
        source = original(kept, site)
        tensor = head.get(name)
        if tensor is None:
            tensor = getattr(base.get_submodule(source), leaf)
        if source in left:
            tensor = left[source](tensor, leaf)
        if site in updates and leaf == "weight":
            tensor = merged_weight(tensor, *updates[site])
        return tensor.detach()

    names = model.state_dict()
    return Streamed(model, {name: torch.no_grad()(lambda name=name: made(name)) for name in names})


@dataclass(frozen=True)
class _Cut:
    """What is left of one layer's tensors, from how the base has them."""

    size: Size
    rows: Tensor | None
    """The base's, in the supernet's order; None: as they stand."""
    columns: Tensor | None

    def __call__(self, tensor: Tensor, leaf: str) -> Tensor:
        if leaf == "weight":
            ordered = tensor if self.columns is None else tensor[:, self.columns]
            tensor = self.size.compensated_columns(ordered)
        return self.size.leading(tensor if self.rows is None else tensor[self.rows])


def _left(net: Supernet, sub: SubAdapter, degree: float) -> dict[str, _Cut]:
    """By elastic layer."""
    moved = net.permutations()
    with net.active(sub, degree):
        return {
            site: _Cut(copy.copy(layer.size), moved.get((site, "out")), moved.get((site, "in")))
            for site, layer in modules_of(net.model, ElasticLinear)
        }
