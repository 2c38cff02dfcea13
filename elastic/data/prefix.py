"""What all sequences begin with, read once: the instruction of a published prompt, say.

A causal model's keys and values of a token depend on nothing behind it, so those of a common start
serve every row of every batch. The rows' own tokens follow it at once, padded behind, so that their
places are their positions as if the whole had been read: windows, linear biases and learnt
positions hold without a word about them here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from elastic.data.encoding import Encoded
from elastic.models import compat
from elastic.models.kinds import Kind, kind_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


SHORTEST = 8
"""Tokens below which a common start is not worth a forward pass of its own."""


@dataclass(frozen=True)
class Prefix:
    """The common start of some sequences as a model has read it; reading on does not change it, so
    it serves batches of any size."""

    length: int
    cache: Cache

    def without(self, sequence: Encoded) -> Encoded:
        """The rest of a sequence that begins with it."""
        return replace(sequence, ids=sequence.ids[self.length :])


def read(model: PreTrainedModel, sequences: Sequence[Encoded]) -> Prefix | None:
    """The start that all sequences share, read by the model as it is now; None where there is none
    that pays, or where the rest could not go on from it."""
    length = shared(sequences)
    if length < SHORTEST or len(sequences) < 2 or not _goes_on(model):
        return None
    ids = torch.tensor([sequences[0].ids[:length]], device=model.device)
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    cache = compat.cache_of(output)
    layers = [_fixed(layer) for layer in cache.layers] if isinstance(cache, Cache) else [None]
    return None if None in layers else Prefix(length, Cache(layers=layers))


def shared(sequences: Sequence[Encoded]) -> int:
    """How many tokens all sequences begin with; every one keeps at least one before its answer."""
    most = min((len(each.ids) - each.answer - 1 for each in sequences), default=0)
    return max(0, min(common_start([each.ids for each in sequences]), most))


def common_start(rows: Sequence[tuple[int, ...]]) -> int:
    """How many numbers all rows begin with."""
    # What the first and the last in order share, all in between share too.
    first, last = min(rows, default=()), max(rows, default=())
    pairs = enumerate(zip(first, last, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(last)))


def _goes_on(model: PreTrainedModel) -> bool:
    """Whether it is a decoder whose keys do not depend on how long the sequence will be."""
    decodes = kind_of(model) is Kind.DECODER
    return decodes and not _rotates_by_length(model.config.get_text_config(decoder=True))


def _rotates_by_length(config: PretrainedConfig) -> bool:
    """Whether its rotary frequencies are chosen by the longest position of a forward pass."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(each for each in found.values() if isinstance(each, Mapping))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def _fixed(layer: Any) -> _Fixed | _FixedWindow | None:
    """One layer's keys and values as all rows may share them; None for other kinds of memory, such
    as a state, keys that layers share, or quantised ones."""
    kinds: dict[Any, Any] = {DynamicLayer: _Fixed, DynamicSlidingWindowLayer: _FixedWindow}
    kind = kinds.get(type(layer))
    return kind(layer) if kind and layer.is_initialized else None


class _Fixed(DynamicLayer):
    """Keys and values (1, heads, start, dim) that every row of a batch goes on from. What the rows
    add is attended to and not kept: no more than one layer's copy is alive at a time."""

    def __init__(self, read: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(read.keys, read.values)
        self.keys, self.values = read.keys, read.values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return _after(self.keys, key_states), _after(self.values, value_states)


class _FixedWindow(DynamicSlidingWindowLayer):
    """The same of a layer that attends to a window: of the start it has what the window reaches."""

    def __init__(self, read: DynamicSlidingWindowLayer) -> None:
        super().__init__(read.sliding_window)
        self.lazy_initialization(read.keys, read.values)
        self.keys, self.values = read.keys, read.values
        self.cumulative_length = read.cumulative_length

    update = _Fixed.update


def _after(start: Tensor, new: Tensor) -> Tensor:
    return torch.cat([start.expand(len(new), -1, -1, -1), new], dim=-2)
