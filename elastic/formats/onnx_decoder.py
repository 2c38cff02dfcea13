"""A decoder as a graph with a KV cache: how it is called while it is traced."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from elastic.errors import ExportError
from elastic.formats.onnx_session import cache_names, filled, flattened, layers_of
from elastic.formats.tracing import Flat, Trace, ones
from elastic.models import compat
from elastic.models.kinds import first_position

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

KEYS_AND_VALUES = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""What transformers calls layers of a cache that hold nothing else."""


def decoder_trace(model: PreTrainedModel, logits: str) -> Trace:
    """What to trace of a decoder: tokens and its cache in, logits and the longer cache out."""

    def call(
        input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        # By its index, not as a slice: then the graph says that it is the last position, which is
        # how onnxruntime-genai knows.
        last = torch.tensor([-1], device=input_ids.device)
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids + first_position(model),
            use_cache=True,
            logits_to_keep=last if logits == "last" else 0,
            **compat.given(model, filled(past)),
        )
        return output.logits, *flattened(compat.cache_of(output))

    names, example = _example(model)
    outputs = ["logits", *cache_names("present", len(names) // 2)]
    inputs = ["input_ids", "attention_mask", "position_ids", *names]
    dynamic = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "position_ids")}
    dynamic |= {"attention_mask": {0: "batch", 1: "total"}}
    dynamic |= {name: {0: "batch", 2: "past"} for name in names}
    dynamic |= {name: {0: "batch", 2: "total"} for name in outputs[1:]}
    dynamic |= {"logits": {0: "batch"} if logits == "last" else {0: "batch", 1: "sequence"}}
    return Trace(Flat(call, model=model), example, inputs, outputs, dynamic)


def _example(model: PreTrainedModel) -> tuple[list[str], tuple[Tensor, ...]]:
    """Names of the cached tensors and sample arguments to trace with, none of their axes 0 or 1.
    ExportError where more is cached than keys and values, or less."""
    batch, sequence = 2, 3
    ids = ones(model, batch, sequence)
    cache = compat.cache_of(model(input_ids=ids, use_cache=True))
    if cache is None:
        raise ExportError(
            f"onnx: {type(model).__name__} caches nothing that a graph could go on from"
        )
    kinds = [type(layer).__name__ for layer in layers_of(cache)]
    if strange := next((kind for kind in kinds if kind not in KEYS_AND_VALUES), None):
        raise ExportError(
            f"onnx: {type(model).__name__} caches more than keys and values ({strange}), for which "
            "graphs have no inputs"
        )
    past = flattened(cache)
    length = past[0].shape[2]
    mask = ones(model, batch, length + sequence)
    positions = torch.arange(length, length + sequence, device=model.device).repeat(batch, 1)
    return cache_names("past_key_values", len(past) // 2), (ids, mask, positions, *past)
