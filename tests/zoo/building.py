"""A family's model, small and random, and what it is asked."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from elastic.models.modules import linear_
from tests.helpers import tiny
from tests.zoo.families import FLOAT32, SIZES, SPECIAL

MAPPINGS = {
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "encoder-decoder": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
"""By what a model is for: types of models, and the names of their classes."""
AUTO = {
    "causal": "AutoModelForCausalLM", "encoder-decoder": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
}  # fmt: skip
FOR = {
    "causal": {"is_decoder": True, "is_encoder_decoder": False},
    "encoder-decoder": {"decoder_start_token_id": tiny.PAD},
    "classification": {"num_labels": 3},
}
"""What a configuration says besides its sizes."""


def config_of(model_type: str, use: str) -> PreTrainedConfig:
    """The family's configuration, small."""
    kind = CONFIG_MAPPING[model_type]
    # Most causal models are nothing else, and have no word for it.
    said = {k: v for k, v in FOR[use].items() if use != "causal" or k in _names(kind)}
    config = kind(**_settings(kind, SPECIAL.get(model_type, {})) | said)
    config.use_cache = False
    return config


def _settings(kind: type[PreTrainedConfig], special: dict[str, Any]) -> dict[str, Any]:
    """Those of `SIZES` that this class knows, in the configurations within it as well."""
    known = _names(kind)
    settings = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in known:  # keys and values of all heads come from one latent state
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    inner = [name for name in kind.sub_configs if name in known]
    for name in inner:
        said = special.get(name, {})
        if (one := _inner(kind, name, said)) is not None:
            settings[name] = {**_settings(one, said), "model_type": one.model_type}
    return settings | {name: value for name, value in special.items() if name not in inner}


def _names(kind: type[PreTrainedConfig]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _inner(
    kind: type[PreTrainedConfig], name: str, said: dict[str, Any]
) -> type[PreTrainedConfig] | None:
    """The class of a configuration within another; None where there is none by default."""
    if "model_type" in said:
        return CONFIG_MAPPING[said["model_type"]]
    default = getattr(kind(), name)
    return None if default is None else type(default)


def dtype_of(model_type: str) -> torch.dtype:
    """float64, unless the family's code fixes another type."""
    return torch.float32 if model_type in FLOAT32 else torch.float64


def model_of(config: PreTrainedConfig, use: str, dtype: torch.dtype) -> PreTrainedModel:
    """With weights that all matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = linear_(getattr(transformers, AUTO[use]).from_config(config).to(dtype))
        fill_(model)
    return model.eval().requires_grad_(False)


def fill_(model: nn.Module) -> None:
    """Weights of a size at which every layer changes the logits; norms and biases moved away from
    where they start."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.dtype.is_floating_point:
            nn.init.normal_(parameter, std=1.2 / parameter.shape[-1] ** 0.5)
        else:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    for module in model.modules():  # padding is zero, which some classes see to when they load
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx].zero_()


def inputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two sequences, for whatever kind of head the model has."""
    ids = tiny.tokens()
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    return inputs


def output(model: PreTrainedModel) -> Tensor:
    """Logits; experts one by one, as no kernel of theirs knows float64."""
    if _has_experts(model):
        model.set_experts_implementation("eager")
    return model(**inputs_of(model)).logits


def _has_experts(model: nn.Module) -> bool:
    """Whether several experts share a tensor, for which there are several kernels."""
    return any(p.dim() == 3 and "experts" in name for name, p in model.named_parameters())
