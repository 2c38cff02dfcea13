"""The language model of a larger class as a model of its own, around the same tensors.

It is of the class that transformers has for it (Gemma 3's text as Gemma3ForCausalLM) or, where that
has none, of one whose function on text is the same: the rotary embeddings of Qwen-VL in three parts
are Qwen's where all three count the same tokens.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from elastic.errors import ExportError
from elastic.models import compat
from elastic.models.cut_head import CutHead
from elastic.models.modules import module_tree, put_
from elastic.models.vocabulary import put_head_
from elastic.models.wrappers import (
    language_model,
    no_text_class,
    text_class,
    text_config,
    wraps,
)
from elastic.spaces.dims import QUERIES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SETTINGS = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}
"""By type of language model, what the class that computes the same does where it is told to."""
TOKENS = 8
"""On which both models are asked."""
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far logits may be apart, in parts of the largest; in other types a tenth."""


def why_not(model: PreTrainedModel) -> str | None:
    """Why the language model of this one cannot be written alone; None if it can, or is all there
    is."""
    try:
        as_text(model)
    except ExportError as error:
        return str(error)
    return None


def about(model: PreTrainedModel) -> dict[str, bool]:
    """For the report, of a format that has no place for the rest of a model."""
    return {"text_only": True} if wraps(model.config) else {}


def as_text(model: PreTrainedModel) -> PreTrainedModel:
    """A model of text as it is, and of any other its language model."""
    return text_only(model) if wraps(model.config) else model


@torch.no_grad()
def text_only(model: PreTrainedModel) -> PreTrainedModel:
    """The language model of a compact model that reads more than text; that one is left as it is.

    ExportError where there is no class for it, or where what it computes of text is not the same.
    """
    if reason := no_text_class(model.config):
        raise ExportError(reason)
    whole = module_tree(model)
    body, head = whole.get_submodule(language_model(whole)), whole.get_output_embeddings()
    kind = text_class(whole.config)
    assert kind is not None
    text = body if type(body) is kind else _of(kind, whole, body, head)
    if model.can_generate():
        text.generation_config = copy.deepcopy(model.generation_config)
    text.config.architectures = [kind.__name__]
    text = text.eval().requires_grad_(False)
    _require_same(model, text)
    return text


def _of(
    kind: type[PreTrainedModel], whole: PreTrainedModel, body: Any, head: nn.Module
) -> PreTrainedModel:
    config = text_config(whole.config)
    config.tie_word_embeddings = head.weight is whole.get_input_embeddings().weight
    if not isinstance(config, kind.config_class):
        config = _translated(config, kind.config_class)
    with torch.device("meta"):
        text = kind(config)
    prefix = kind.base_model_prefix
    own = text.get_submodule(prefix)
    if type(own) is type(body):
        text.set_submodule(prefix, body)
    else:
        _take_(own, body)
    name = next(name for name, each in text.named_modules() if each is text.get_output_embeddings())
    if isinstance(head, CutHead):
        put_head_(text, name, head)
    else:
        text.set_submodule(name, head)
    return text


def _translated(config: PretrainedConfig, kind: type[PretrainedConfig]) -> PretrainedConfig:
    """The same settings of another type, as far as that knows them."""
    words = config.to_dict()
    known = vars(kind())
    found = {key: words[key] for key in words if key in known and key != "model_type"}
    rope = {key: x for key, x in words["rope_parameters"].items() if not key.startswith("mrope_")}
    found |= {"rope_parameters": rope} | SETTINGS.get(config.model_type, {})
    size = words.get("head_dim")
    return kind(**found | ({"head_dim": size} if size else {}))


def _take_(own: nn.Module, body: nn.Module) -> None:
    """Layers and tensors of one model in the places of these names in another, whose modules are of
    other classes with the same names."""
    for name, module in list(own.named_modules()):
        same = body.get_submodule(name)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            own.set_submodule(name, same)
            continue
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for leaf, _ in tensors:
            put_(module, leaf, getattr(same, leaf))
        if hasattr(same, QUERIES):
            setattr(module, QUERIES, getattr(same, QUERIES))


def _require_same(model: PreTrainedModel, text: PreTrainedModel) -> None:
    """ExportError unless both say the same of some tokens."""
    compat.forget_(model)
    size = text_config(model.config).vocab_size
    ids = torch.arange(TOKENS, device=model.device)[None] * (size // TOKENS)
    expected = model(input_ids=ids, use_cache=False).logits
    found = text(input_ids=ids, use_cache=False).logits
    seen = expected.isfinite() & found.isfinite()  # of tokens that are cut neither is
    gap = (found - expected).where(seen, 0).abs().max()
    allowed = ROUNDING.get(model.dtype, 0.1) * expected.where(seen, 0).abs().max()
    if not gap <= allowed or not torch.equal(expected.isfinite(), found.isfinite()):
        raise ExportError(
            f"{type(text).__name__} computes something else of text than the language model of "
            f"{type(model).__name__}: logits differ by up to {float(gap):.3g}"
        )
