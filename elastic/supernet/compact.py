"""From the active part of a supernet to a small model of plain layers: sliced, then merged."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastic.adapters.experts import ElasticExperts, FactorExperts
from elastic.adapters.layers import ElasticLinear, FactorLinear
from elastic.console import busy
from elastic.models.modules import (
    dequantise_,
    module_tree,
    modules_of,
    plain_linear,
    put_,
)
from elastic.spaces.bound import SubAdapter
from elastic.supernet.depth import settle_
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
    with net.active(net.space.with_whole_vocabulary(sub), degree):
        layers = list(modules_of(net.model, ElasticLinear))
        model = module_tree(net.model, (layer for _, layer in layers))
        for site, layer in layers:
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
        for site, experts in list(modules_of(model, ElasticExperts)):
            if not site.startswith(left_out):
                model.set_submodule(site, _plain_experts(experts))
    return net.cut_vocabulary_(dequantise_(settle_(model)), sub).eval()


def _plain_experts(layer: ElasticExperts) -> nn.Module:
    """The family's own module with what is active, perhaps with factors beside it; `layer` is the
    slice's own."""
    for name, tensor in layer.without_update().items():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        is_parameter = name in dict(layer.base.named_parameters())
        put_(layer.base, name, nn.Parameter(tensor, False) if is_parameter else tensor)
    if not layer.factors:
        return layer.base
    factors = {}
    for name, own in layer.factors.items():
        A, B = own.active(layer.size, layer.full)
        A = A.clone(memory_format=torch.contiguous_format)
        factors[name] = A, (own.adapter.scale * B).contiguous()
    return FactorExperts(layer.base, factors)


@torch.no_grad()
def merge_(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every layer with factors of a sliced model by a plain one with weight W + B A, in
    place.

    Update and sum are formed in float32 (float64 for a float64 model) and cast once, so the error
    is half a unit in the last place of the weight's type.
    """
    for name, (A, B) in part_(model).items():
        merged = merged_weight(model.get_parameter(name), A, B)
        put_(model, name, nn.Parameter(merged, requires_grad=False))
    return model


def part_(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Replace every layer with factors of a sliced model by a plain one without them, in place; A
    and B by the parameter that B A belongs to."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for site, layer in modules_of(model, FactorLinear):
        factors[f"{site}.weight"] = layer.A.data, layer.B.data
        bias = None if layer.bias is None else layer.bias.data
        model.set_submodule(site, plain_linear(layer.weight.data, bias))
    for site, experts in modules_of(model, FactorExperts):
        for name, A in experts.A.items():
            factors[f"{site}.{name}"] = A.data, experts.B[name].data
        model.set_submodule(site, experts.base)
    return factors


def merged_weight(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """weight + B A, (out, in) or for every expert, formed in float32 (float64 if it is) and rounded
    once."""
    if weight.dim() == 3:  # one at a time: the wide type takes room
        return torch.stack([merged_weight(*one) for one in zip(weight, A, B, strict=True)])
    wide = wide_type(weight)
    return torch.addmm(weight.to(wide), B.to(wide), A.to(wide)).to(weight.dtype)


def compact(net: Supernet, sub: SubAdapter, degree: float = 0.0) -> PreTrainedModel:
    """`sub` as a model of plain linear layers: sliced, then merged."""
    with busy("cutting the sub-adapter out"):
        return merge_(sliced(net, sub, degree))


def wide_type(tensor: Tensor) -> torch.dtype:
    """The type that a weight and its update are added in."""
    return torch.promote_types(tensor.dtype, torch.float32)
