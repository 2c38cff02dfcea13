"""A decoder as a graph with a KV cache: how it is called while it is traced."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastic.formats.onnx_session import cache_names, filled, flattened
from elastic.formats.tracing import Trace
from elastic.models import compat

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def _decoder(model: PreTrainedModel, logits: str) -> Trace:
    names, example = _example(model)
    outputs = ["logits", *cache_names("present", len(names) // 2)]
    inputs = ["input_ids", "attention_mask", "position_ids", *names]
    dynamic = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "position_ids")}
    dynamic |= {"attention_mask": {0: "batch", 1: "total"}}
    dynamic |= {name: {0: "batch", 2: "past"} for name in names}
    dynamic |= {name: {0: "batch", 2: "total"} for name in outputs[1:]}
    dynamic |= {"logits": {0: "batch"} if logits == "last" else {0: "batch", 1: "sequence"}}
    return Trace(_flat(model, logits), example, inputs, outputs, dynamic)


def _example(model: PreTrainedModel) -> tuple[list[str], tuple[Tensor, ...]]:
    """Names of the cached tensors and sample arguments to trace with, none of their axes 0 or 1."""
    import torch

    batch, sequence = 2, 3
    ids = torch.ones(batch, sequence, dtype=torch.long, device=model.device)
    past = flattened(compat.cache_of(model(input_ids=ids, use_cache=True)))
    length = past[0].shape[2]
    mask = torch.ones(batch, length + sequence, dtype=torch.long, device=model.device)
    positions = torch.arange(length, length + sequence, device=model.device).repeat(batch, 1)
    return cache_names("past_key_values", len(past) // 2), (ids, mask, positions, *past)


def _flat(model: PreTrainedModel, logits: str) -> nn.Module:
    """The model as a function of tensors alone: no cache object enters or leaves."""
    import torch

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
        ) -> tuple[Tensor, ...]:
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=True,
                logits_to_keep=_last(input_ids) if logits == "last" else 0,
                **compat.given(self.model, filled(past)),
            )
            return output.logits, *flattened(compat.cache_of(output))

    return Flat()


def _last(input_ids: Tensor) -> Tensor:
    """The last position by its index, not as a slice: then the graph says that it is one, which is
    how onnxruntime-genai knows."""
    import torch

    return torch.tensor([-1], device=input_ids.device)
