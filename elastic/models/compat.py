"""What is here for the sake of particular releases of transformers, and the release that ends it.

Release 5.40 no longer knows `past_key_values`, which 5.24 renamed to `cache`, argument and output;
till then classes of older releases, and from elsewhere, have the former name. Releases before 5.0
want some settings of our folders in words of their own, as long as folders are to be read by them.
Classes that a release cannot run stand in BROKEN until one can.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache
    from transformers.utils import ModelOutput


NAME, FORMER = "cache", "past_key_values"
BROKEN = ("Llama4ForConditionalGeneration",)
"""Classes that read images, and of which 5.24 cannot run a forward pass: this one asks its own
language model for `image_outputs`, which that does not return. Their language model is loaded by
its own class instead."""


def given(model: PreTrainedModel, cache: Cache | None) -> dict[str, Cache | None]:
    """The argument by which `model` goes on from what it has cached (until 5.40)."""
    return {_name(type(model).forward): cache}


@lru_cache
def _name(forward: Callable[..., Any]) -> str:
    return NAME if NAME in inspect.signature(forward).parameters else FORMER


def cache_of(output: ModelOutput) -> Cache | None:
    """What a model cached; None where it did not, or carries something else (until 5.40)."""
    return getattr(output, NAME if hasattr(output, NAME) else FORMER, None)


def forget_(model: PreTrainedModel) -> None:
    """Without what Qwen-VL's classes keep of the last text that was generated: how far positions of
    pictures are from those of tokens (`rope_deltas`), for as many rows as there were then."""
    for module in (model, model.base_model):
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


def rotary_words(config: PretrainedConfig) -> dict[str, Any]:
    """Settings of rotary embeddings as releases before 5.0 read them, at the top level only:
    without them they fall back to others silently."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping) or "rope_theta" not in rope:
        return {}
    base, part = rope["rope_theta"], rope.get("partial_rotary_factor")
    words = {"rope_theta": base}
    if "gpt_neox" in config.model_type:
        words = {"rotary_emb_base": base, "rotary_pct": 1.0 if part is None else part}
    elif part is not None:
        words["partial_rotary_factor"] = part
    if rope.get("rope_type", "default") != "default":
        words["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return words


def counted_heads(
    model: PreTrainedModel, expected: Mapping[str, list[int]]
) -> dict[str, dict[str, int]]:
    """By attention module, attributes by which releases before 5.0 reshape, where later ones ask
    the projections. Of modules whose query has another [out, in] than `expected` of its name."""
    found = {}
    for name, module in model.named_modules():
        query = getattr(module, "query", None)
        if hasattr(module, "all_head_size") and isinstance(query, nn.Linear):
            size = query.out_features
            if size != expected[f"{name}.query"][0]:
                heads = size // module.attention_head_size
                found[name] = {"num_attention_heads": heads, "all_head_size": size}
    return found


def tokenizer_words(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a `tokenizer_config.json` says, as releases before 5.0 know it too: their own name of
    the class, and of the list of special tokens, for which they have another meaning."""
    words = dict(values)
    if words.get("tokenizer_class") == "TokenizersBackend":
        words["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(words.get("extra_special_tokens"), list):
        words["additional_special_tokens"] = words.pop("extra_special_tokens")
    return words
