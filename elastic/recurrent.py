"""Models that carry a state from token to token instead of a cache (RWKV).

They have no attention mask: what they read stays in their state. So padding goes behind the tokens
(`elastic/behind.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
