"""Models that compute what Llama does, so that other programs run them with their Llama's code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def why_not(model: PreTrainedModel) -> str | None:
    """What a model of Llama's layers computes otherwise; None where it is only sizes and biases."""
    config = model.config
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        return f"rotary embeddings of type {kind!r}; default, linear and llama3 are written"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "only a part of each head is rotated, and this format rotates all of it"
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if windows or (type(model).__name__.startswith("Mistral") and config.sliding_window):
        return "attention with a sliding window, which this format does not have"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act!r}; this format computes silu"
    return None


@dataclass(frozen=True)
class Sizes:
    """Of every layer."""

    heads: tuple[int, ...]
    key_heads: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def uniform(self) -> bool:
        return all(len(set(each)) == 1 for each in (self.heads, self.key_heads, self.widths))


def sizes_of(model: PreTrainedModel) -> Sizes:
    """Those of a compact model."""
    head_size, layers = head_size_of(model), model.model.layers
    return Sizes(
        tuple(layer.self_attn.q_proj.out_features // head_size for layer in layers),
        tuple(layer.self_attn.k_proj.out_features // head_size for layer in layers),
        tuple(layer.mlp.down_proj.in_features for layer in layers),
    )


def head_size_of(model: PreTrainedModel) -> int:
    """Channels of a head, the same in all layers."""
    size: int = model.model.layers[0].self_attn.head_dim
    return size
