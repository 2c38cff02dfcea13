"""Copies the active part of a supernet into small tensors that stand on their own."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from elastic.adapters.attach import ElasticLinear, FactorLinear
from elastic.depth import settle_
from elastic.models.modules import (
    dequantise_,
    module_tree,
    modules_of,
    plain_linear,
    replace_module,
)
from elastic.spaces.bound import SubAdapter
from elastic.supernet import Supernet


@torch.no_grad()
def sliced(net: Supernet, sub: SubAdapter) -> PreTrainedModel:
    """A new model with `sub`'s sizes, its factors beside the weights (unmerged).

    Elastic layers are copied; everything else (embeddings, norms, uncut layers' biases) is shared
    with the supernet, which must not change while the slice is in use. Ties stay ties. Quantised
    weights become dense, in the type they are computed in.
    """
    sub = net.space.check(sub)
    left_out = net.space.left_out(sub)
    with net.active(sub):
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
            replace_module(model, site, small)
    return dequantise_(settle_(model)).eval()
