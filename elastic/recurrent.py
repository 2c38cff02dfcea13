"""Models that carry a state from token to token instead of a cache (RWKV).

They have no attention mask: what they read stays in their state. So padding goes behind the tokens,
where nothing comes after it that counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TYPES = ("rwkv",)


def is_recurrent(config: PretrainedConfig) -> bool:
    return config.model_type in TYPES


def exact_(model: PreTrainedModel) -> PreTrainedModel:
    """Without the halving of weights and states every few blocks, which transformers does in place
    to keep float16 from overflowing and which sees no cut weights; the function is the same. It
    stays off in what is written."""
    if is_recurrent(model.config):
        model.config.rescale_every = 0
    return model


def decoded_together(config: PretrainedConfig, batch: int) -> int:
    """How many sequences at most, of so many: transformers mixes the states of a batch that it
    decodes."""
    return 1 if is_recurrent(config) else batch


def padded_behind(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A left-padded batch, all tensors (rows, length), with the padding on the right."""
    mask = batch["attention_mask"]
    index = (torch.arange(mask.shape[1], device=mask.device) + _padding(mask)) % mask.shape[1]
    return {name: tensor.gather(1, index) for name, tensor in batch.items()}


def answers_of(model: PreTrainedModel, batch: dict[str, Tensor], width: int) -> Tensor:
    """Logits (rows, width, vocabulary) that predict the last tokens of a left-padded batch."""
    logits = model(padded_behind(batch)["input_ids"], use_cache=False).logits
    mask = batch["attention_mask"]
    index = torch.arange(mask.shape[1], device=mask.device) - _padding(mask)
    index = index.clamp(min=0)[:, -width - 1 : -1]
    return logits.gather(1, index[:, :, None].expand(-1, -1, logits.shape[-1]))


def _padding(mask: Tensor) -> Tensor:
    """(rows, 1): how many positions of a row are padding."""
    return mask.shape[1] - mask.sum(1, keepdim=True)
