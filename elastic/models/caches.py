"""A model's key-value cache, by whichever name its class gives it, and as the tensors it holds.

transformers 5.24 renamed the argument and the output `past_key_values` to `cache`; the old name is
announced to go with 5.40, and classes from elsewhere keep it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache
    from transformers.utils import ModelOutput


NAME, FORMER = "cache", "past_key_values"


def given(model: PreTrainedModel, cache: Cache | None) -> dict[str, Cache | None]:
    """The argument by which `model` goes on from what it has cached."""
    return {_name(type(model)): cache}  # type: ignore[arg-type] # classes are hashable


@lru_cache
def _name(kind: type[PreTrainedModel]) -> str:
    return NAME if NAME in inspect.signature(kind.forward).parameters else FORMER


def of(output: ModelOutput) -> Cache | None:
    """What a model cached; None where it did not, or carries something else."""
    return getattr(output, NAME if hasattr(output, NAME) else FORMER, None)


def filled(tensors: Sequence[Tensor]) -> Cache:
    """A cache that holds these keys and values, `key, value` for every layer."""
    from transformers.cache_utils import Cache, DynamicLayer

    layers = []
    for keys, values in zip(tensors[0::2], tensors[1::2], strict=True):
        # Not `update`: it would concatenate to an untyped empty tensor, which OpenVINO refuses.
        layer = DynamicLayer()
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        layer.dtype, layer.device = keys.dtype, keys.device
        layers.append(layer)
    return Cache(layers=layers)


def flattened(cache: Cache) -> list[Tensor]:
    """`key, value` of every layer."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
