"""Modules of a model: found by class, replaced, made plain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from elastic.quantised import QuantisedLinear


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


ModuleType = TypeVar("ModuleType", bound=nn.Module)


def modules_of(model: nn.Module, kind: type[ModuleType]) -> Iterator[tuple[str, ModuleType]]:
    """Name and module of every module of this class, outermost first."""
    for name, module in list(model.named_modules()):
        if isinstance(module, kind):
            yield name, module


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen `nn.Linear` around existing tensors, without initialising others first."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


@torch.no_grad()
def dequantise_(model: ModuleType) -> ModuleType:
    """Replace every quantised layer by a plain one with its weight, in place."""
    for name, layer in modules_of(model, QuantisedLinear):
        replace_module(model, name, plain_linear(layer.weight, layer.bias))
    return model


@torch.no_grad()
def linear_(model: ModuleType) -> ModuleType:
    """Replace every Conv1D of GPT-2, a linear layer whose weight lies (in, out), by a plain one
    around the same memory, in place."""
    for name, layer in modules_of(model, Conv1D):
        replace_module(model, name, plain_linear(layer.weight.T, layer.bias))
    return model
