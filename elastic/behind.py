"""Padding behind the tokens, where a causal model puts nothing that counts after it.

No token then sees padding, a token's place in its row is its position, and no row of attention is
empty. Three kinds of models need that: those that remember what they read (RWKV); those whose
attention turns an empty row into NaN, which zero weights carry on to the real tokens; and any that
goes on from a start read before, when windows and linear biases count places, not positions.

Otherwise padding stands before the tokens: the answers then end at one place in all rows, and fewer
positions need logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elastic.models import caches
from elastic.models.kinds import is_recurrent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from elastic.prefix import Prefix

OVERFLOWING = (torch.float64, torch.float16)
"""Types whose lowest number, with a score added to it, may be -inf to a softmax in float32."""


def padding_is_seen(model: PreTrainedModel) -> bool:
    """Whether padding before the tokens would show in what the model says of them.

    Eager attention masks with the lowest number of the model's type and takes the softmax in
    float32. In bfloat16 and float32 an empty row, that of a padding token, becomes an average of
    all; in float64 it is -inf throughout, and so its softmax NaN; in float16 it may be. Padding is
    then NaN from the first block on, and 0 x NaN is NaN in the next one's sum over values.
    """
    eager = model.config._attn_implementation == "eager" and model.dtype in OVERFLOWING
    return is_recurrent(model.config) or eager


def padded_behind(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A left-padded batch, all tensors (rows, length), with the padding on the right."""
    mask = batch["attention_mask"]
    index = (torch.arange(mask.shape[1], device=mask.device) + _padding(mask)) % mask.shape[1]
    return {name: tensor.gather(1, index) for name, tensor in batch.items()}


def answers_of(
    model: PreTrainedModel, batch: dict[str, Tensor], width: int, prefix: Prefix | None = None
) -> Tensor:
    """Logits (rows, width, vocabulary) that predict the last tokens of a left-padded batch; with a
    prefix, of rows that go on from it, each with at least one token before its answer."""
    mask = batch["attention_mask"]
    rows, length = mask.shape
    ids = padded_behind({"input_ids": batch["input_ids"], "attention_mask": mask})["input_ids"]
    before = torch.arange(length - width - 1, length - 1, device=mask.device)
    wanted, place = (before - _padding(mask)).clamp(min=0).unique(return_inverse=True)
    if is_recurrent(getattr(model, "module", model).config):  # DDP and DeepSpeed wrap it
        logits = model(ids, use_cache=False).logits[:, wanted]
    else:
        seen = prefix.length if prefix else 0
        # Padding gets the last of the positions, not one that the model may not have.
        positions = torch.arange(length, device=mask.device).clamp(max=mask.sum(1).max() - 1)
        cache = caches.given(model, prefix.cache) if prefix else {}
        logits = model(
            input_ids=ids,
            attention_mask=mask.new_ones(rows, seen + length),
            position_ids=(seen + positions).expand(rows, -1),
            logits_to_keep=wanted,
            use_cache=prefix is not None,
            **cache,
        ).logits
    return logits[torch.arange(rows, device=mask.device)[:, None], place]


def _padding(mask: Tensor) -> Tensor:
    """(rows, 1): how many positions of a row are padding."""
    return mask.shape[1] - mask.sum(1, keepdim=True)
