"""Modules of a model: found by class, made plain."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from elastic.models.quantised import QuantisedLinear

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


ModuleType = TypeVar("ModuleType", bound=nn.Module)


def modules_of(model: nn.Module, kind: type[ModuleType]) -> Iterator[tuple[str, ModuleType]]:
    """Name and module of every module of this class, outermost first."""
    for name, module in list(model.named_modules()):
        if isinstance(module, kind):
            yield name, module


def outermost(model: nn.Module, kind: type[ModuleType]) -> Iterator[tuple[str, ModuleType]]:
    """Those of them that are in no other."""
    outer: list[str] = []
    for name, module in modules_of(model, kind):
        if not any(name.startswith(f"{other}.") for other in outer):
            outer.append(name)
            yield name, module


@contextlib.contextmanager
def instead(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the block these modules stand in the model, in the places of those of their names."""
    before = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        model.set_submodule(name, module)
    try:
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in evaluation, without dropout; then as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen `nn.Linear` around existing tensors, without initialising others first."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def put_(model: nn.Module, name: str, tensor: Tensor) -> None:
    """In the place of the model's parameter or buffer of this name."""
    site, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(site), leaf, tensor)


@torch.no_grad()
def dequantise_(model: ModuleType) -> ModuleType:
    """Replace every quantised layer by a plain one with its weight, in place."""
    for name, layer in modules_of(model, QuantisedLinear):
        model.set_submodule(name, plain_linear(layer.weight, layer.bias))
    return model


@torch.no_grad()
def linear_(model: ModuleType) -> ModuleType:
    """Replace every Conv1D of GPT-2, a linear layer whose weight lies (in, out), by a plain one
    around the same memory, in place."""
    for name, layer in modules_of(model, Conv1D):
        model.set_submodule(name, plain_linear(layer.weight.T, layer.bias))
    return model


@torch.no_grad()
def of_conv1d_(model: PreTrainedModel) -> PreTrainedModel:
    """The inverse of `linear_`: a Conv1D wherever the family's class has one, around the same
    memory, in place."""
    for name, _ in modules_of(meta(type(model), model.config), Conv1D):
        linear = model.get_submodule(name)
        with torch.device("meta"):
            layer = Conv1D(*linear.weight.shape)
        layer.weight = nn.Parameter(linear.weight.T, requires_grad=False)
        layer.bias = nn.Parameter(linear.bias, requires_grad=False)
        model.set_submodule(name, layer)
    return model


def meta(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """A new model of this class without memory."""
    with torch.device("meta"):
        return kind(copy.deepcopy(config))


def module_tree(model: ModuleType, shared: Iterable[nn.Module] = ()) -> ModuleType:
    """A copy of the modules around the same tensors: none is duplicated, ties stay ties. Modules in
    `shared`, which are about to be replaced, say, are in it themselves."""
    same = [*model.parameters(), *model.buffers(), *shared]
    return copy.deepcopy(model, {id(one): one for one in same})


def without_values(model: ModuleType, device: torch.device) -> ModuleType:
    """A copy whose tensors have the same shapes and types and are not filled, on this device; ties
    stay ties. A model on meta tensors will do."""
    memory: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        bare = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        parameter = isinstance(tensor, nn.Parameter)
        memory[id(tensor)] = nn.Parameter(bare, requires_grad=False) if parameter else bare
    return copy.deepcopy(model, memory)


def configure_(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Every module that holds the model's configuration, or one within it, holds this one or the
    one that it has there instead, in place."""
    new = {id(old): own for old, own in _parts(model.config, config)}
    for module in model.modules():
        if own := new.get(id(vars(module).get("config"))):
            module.config = own
    return model


def _parts(
    old: PretrainedConfig, new: PretrainedConfig
) -> Iterator[tuple[PretrainedConfig, PretrainedConfig]]:
    """Both, and what they have within them by the same name."""
    yield old, new
    for name in old.sub_configs:
        if getattr(old, name, None) is not None:
            yield from _parts(getattr(old, name), getattr(new, name))


PREFIX = "elastic_"
"""Before the family's type, in the type of what is written."""
SIZES = ("linear_sizes", "attention_sizes", "tensor_sizes")
"""What its config says beside the family's, and again as `per_layer_config`."""


def of_family_(config: PretrainedConfig) -> PretrainedConfig:
    """A small class's config as its family's, in place: modules share the object."""
    if config.model_type.startswith(PREFIX):
        family = _family(type(config))
        if not family().is_heterogeneous:  # else it is the family's own
            config.per_layer_config = None
        config.__class__ = family
        for name in (*SIZES, "auto_map", "model_type"):
            config.__dict__.pop(name, None)
    return config


def as_cut_(model: PreTrainedModel) -> PreTrainedModel:
    """A model of a small class as one of its family's, in place."""
    from transformers import PreTrainedModel

    if model.config.model_type.startswith(PREFIX):
        for module in model.modules():  # encoders and decoders have copies of their own
            if hasattr(module, "config"):
                of_family_(module.config)
            if isinstance(module, PreTrainedModel):  # a stack may have a small class, too
                module.__class__ = _family(type(module))
        model.config.architectures = [type(model).__name__]
    return model


def _family(kind: type) -> type:
    """The class of transformers that a small class is of; it derives from it, more than once."""
    return next(each for each in kind.__mro__ if each.__module__.startswith("transformers."))
