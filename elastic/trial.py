"""Whether what a search space cuts fits together: the model's own code says it, on tensors without
data."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from elastic.config import AdapterConfig
from elastic.console import logging_at
from elastic.errors import ConfigError
from elastic.models.modules import modules_of
from elastic.supernet import Supernet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from elastic.spaces.declared import SearchSpace


def require_fits(model: PreTrainedModel, space: SearchSpace, rank: int) -> None:
    """ConfigError for a space whose smallest sub-adapter the model cannot run, a layer left out of
    a group, say, or whose factors would do nothing. Nothing is said of a model whose code needs
    values, and runs at no size."""
    used = called(model)
    if used is None:
        return
    idle = next((site for site in space.bind(model, rank).targets if site not in used), None)
    if idle:
        raise ConfigError(
            f"{space.source}: adapt: {type(model).__name__} never calls {idle!r} (it may read its "
            "weight), so factors would do nothing there; leave it out"
        )
    if reason := refusal(model, space, rank):
        raise ConfigError(
            f"{space.source}: {type(model).__name__} runs whole, but not cut to the smallest "
            f"choices: {reason}; every layer that makes or reads the channels of a group must be "
            "in it"
        )


def called(model: PreTrainedModel) -> set[str] | None:
    """Names of the linear layers that are called; None if the model does not run without data."""
    names: set[str] = set()
    with _without_data(model) as (empty, inputs):
        for name, layer in modules_of(empty, nn.Linear):
            layer.register_forward_pre_hook(lambda *_, name=name: names.add(name))
        try:
            empty(**inputs)
        except Exception:  # whatever the model's code says
            return None
    return names


def refusal(model: PreTrainedModel, space: SearchSpace, rank: int) -> str | None:
    """Why the smallest sub-adapter, of factors of this rank, does not fit together; None if it
    does."""
    with _without_data(model) as (empty, inputs):
        try:
            net = Supernet(empty, space, AdapterConfig(rank=rank), start=False)
            with net.active(net.space.minimal()) as small:
                small(**inputs)
        except Exception as error:  # whatever the model's code says
            return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


@contextlib.contextmanager
def _without_data(model: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, dict[str, Tensor]]]:
    """A copy of a model (meta tensors will do) on tensors without data, and inputs for it."""
    log = logging_at("torch._subclasses.fake_tensor", logging.CRITICAL)  # failures are asked for
    with FakeTensorMode(), torch.no_grad(), log:
        memory = {}
        for tensor in (*model.parameters(), *model.buffers()):
            bare = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            memory[id(tensor)] = nn.Parameter(bare, False) if is_parameter else bare
        inputs = {"input_ids": torch.zeros((1, 2), dtype=torch.int64)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        empty = copy.deepcopy(model, memory)
        empty.set_attn_implementation("eager")  # fused kernels do not look at shapes without data
        yield empty, inputs
