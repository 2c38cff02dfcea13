"""Folds low-rank updates into base weights."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from elastic.adapters.attach import FactorLinear, modules_of, plain_linear, replace_module
from elastic.slicing import sliced
from elastic.space import SubAdapter
from elastic.supernet import Supernet


@torch.no_grad()
def merge_(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every factor layer of a sliced model by a plain linear with weight W + B A, in place.

    Update and sum are formed in float32 (float64 for a float64 model) and cast once, so the error
    is half a unit in the last place of the weight's type.
    """
    for site, layer in modules_of(model, FactorLinear):
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        merged = torch.addmm(layer.weight.to(wide), layer.B.to(wide), layer.A.to(wide))
        bias = None if layer.bias is None else layer.bias.data
        replace_module(model, site, plain_linear(merged.to(layer.weight.dtype), bias))
    return model


def compact(net: Supernet, sub: SubAdapter) -> PreTrainedModel:
    """`sub` as a model of plain linear layers: sliced, then merged."""
    return merge_(sliced(net, sub))
