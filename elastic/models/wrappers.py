"""Models that read images, or sounds, beside text: a language model inside of a larger class.

The whole class is loaded, run on text alone and written again. What is outside of its language
model, a vision tower or a projector, is neither trained nor ordered nor cut.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from elastic.models.compat import BROKEN
from elastic.models.modules import PREFIX

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


OWN = "Elastic"
"""Before the name of the family's class, in a class of ours for layers of unlike sizes."""


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """What a configuration says of the language model alone; itself, of a model of text."""
    if not hasattr(config, "get_text_config") or config.is_encoder_decoder:
        return config  # of a model's own code, or of two stacks that both read text
    try:
        return config.get_text_config()
    except ValueError:  # it has several, and is no wrapper of one
        return config


def wraps(config: PretrainedConfig) -> bool:
    """Whether this is the configuration of a language model inside of a larger class."""
    return text_config(config) is not config


def auto_of(name: str) -> str | None:
    """transformers' auto class for a class of this name that reads more than text; None for another
    class."""
    return _autos().get(name.removeprefix(OWN))


def auto_for(architecture: PretrainedConfig) -> str | None:
    """The auto class that loads the whole class which a folder's configuration names; None for a
    model of text, or a class that this release of transformers cannot run."""
    if not wraps(architecture):
        return None
    saved = [name.removeprefix(OWN) for name in architecture.architectures or []]
    known = _classes().get(architecture.model_type.removeprefix(PREFIX))
    name = saved[0] if saved else known
    return None if name is None or name != known or name in BROKEN else auto_of(name)


@lru_cache
def _classes() -> dict[str, str]:
    """By type of model, the class that reads more than text and answers with text."""
    from transformers.models.auto import modeling_auto as auto

    return {
        **auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }


@lru_cache
def _autos() -> dict[str, str]:
    from transformers.models.auto import modeling_auto as auto

    pictures = set(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    others = {*auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()}
    return {
        name: "AutoModelForImageTextToText" if name in pictures else "AutoModelForMultimodalLM"
        for name in _classes().values()
        if name not in others
    }


SAME_ON_TEXT = {
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
    "qwen3_vl_moe_text": "Qwen3MoeForCausalLM",
}
"""By type of language model of which there is no class: one that computes the same of text."""


def text_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class of the language model alone; None where transformers has none."""
    import transformers

    own = text_config(config)
    if name := SAME_ON_TEXT.get(own.model_type):
        return getattr(transformers, name)
    known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    found = known.get(type(own), None)
    return None if isinstance(found, tuple) else found


def no_text_class(config: PretrainedConfig) -> str | None:
    """Why the language model of a class of this configuration is no model of its own; None if it
    is, or all there is."""
    if not wraps(config) or text_class(config) is not None:
        return None
    return (
        f"transformers has no class for the language model of {config.model_type} alone "
        f"({text_config(config).model_type})"
    )


def language_model(model: nn.Module) -> str:
    """The name of the language model inside of a model; nothing where the model is all of it."""
    config: Any = getattr(model, "config", None)
    if config is None or not wraps(config):
        return ""
    own = text_config(config)
    inside = [(name, getattr(each, "config", None)) for name, each in model.named_modules() if name]
    same = (name for name, found in inside if found is own)
    alike = (name for name, found in inside if type(found) is type(own))
    return next(same, None) or next(alike, "")


def outside(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the outermost modules that no text passes through; none of a model of text."""
    inside = language_model(model)
    if not inside:
        return ()
    text = [inside, *head_names(model)]
    found: list[str] = []
    for name, _ in model.named_modules():
        around = not name or any(f"{other}.".startswith(f"{name}.") for other in text)
        if not around and not is_in(name, (*text, *found)):
            found.append(name)
    return tuple(found)


def head_names(model: PreTrainedModel) -> list[str]:
    """The name of its language-model head, if it has one."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head]


def is_in(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a module, or tensor, of this name is one of these, or in one of them."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)
