"""What Gemma 3 computes otherwise than Llama, and how much of that llama.cpp knows.

Every sixth layer sees all tokens, the others a window of them, each kind with positions of its own;
queries and keys are normalised, and so is what every block adds. llama.cpp's src/models/gemma3.cpp
has the window from the file, and the rest of it in its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PERIOD, WINDOW_BASE = 6, 10000.0
"""Of the layers that see all tokens, and the base of the others' rotary embeddings."""
LARGEST = 62
"""Layers of the one model whose queries llama.cpp scales otherwise."""


def is_one(model: PreTrainedModel) -> bool:
    """Whether it is a Gemma 3 that reads text alone."""
    return type(model).__name__ == "Gemma3ForCausalLM"


def positions(config: PretrainedConfig) -> Mapping[str, Any]:
    """Settings of rotary embeddings, of layers that see all tokens where there are others."""
    rope: Mapping[str, Any] = config.rope_parameters
    return rope.get("full_attention", rope)


def why_not(model: PreTrainedModel) -> str | None:
    """What of this model llama.cpp would compute otherwise; None where it does the same."""
    config, layers = model.config, len(model.model.layers)
    wanted = ["sliding_attention" if (n + 1) % PERIOD else "full_attention" for n in range(layers)]
    if list(config.layer_types) != wanted:
        return f"other layers than every {PERIOD}th see all tokens"
    near = config.rope_parameters["sliding_attention"]
    if (near["rope_type"], near["rope_theta"]) != ("default", WINDOW_BASE):
        return f"the window's rotary embeddings have another base than {WINDOW_BASE:g}"
    kind = positions(config)["rope_type"]
    if kind not in ("default", "linear"):
        return f"rotary embeddings of type {kind!r}; default and linear are written"
    if config.hidden_activation != "gelu_pytorch_tanh":
        return f"the activation {config.hidden_activation!r}; gelu_pytorch_tanh is computed"
    if config.final_logit_softcapping or config.attn_logit_softcapping:
        return "logits or attention scores that are bent"
    if config.attention_bias or config.use_bidirectional_attention:
        return "biases in attention, or attention to what comes behind"
    if config.query_pre_attn_scalar != config.head_dim or layers == LARGEST:
        return "queries scaled by another number than the size of a head"
    return None
