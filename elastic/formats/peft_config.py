"""What the adapter_config.json of a stock PEFT adapter says, judged before any weights load."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from elastic.errors import RunError, unknown
from elastic.files import read_json
from elastic.models.loading import ADAPTER as PEFT_CONFIG
from elastic.models.modules import modules_of
from elastic.plain import one_line

if TYPE_CHECKING:
    from peft import PeftConfig

BY_INPUT = ("LILY", "POLY", "SHADOW", "XLORA")
"""Methods whose update depends on the input."""
BY_PROMPT = ("alora_invocation_tokens", "arrow_config")
"""Settings of a LoRA whose update does."""
AT_START = ("pissa_niter_", "corda", "lora_ga")
"""Starts that change the base by chance, or by data that is not in the adapter: PEFT would make
another base of it at every load."""
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Starts that take out of the base what the factors begin with."""


def stock_config(folder: Path, where: str) -> PeftConfig:
    """PEFT's own configuration of an adapter; `where` begins every message. It names no base: PEFT
    would ask the hub for it. RunError for one that PEFT does not know, with values of other types,
    or that names code to import."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    file = folder / PEFT_CONFIG
    settings = read_json(file)
    if not isinstance(settings, dict):
        raise RunError(f"{where} {file}: wants a JSON object, has {_shown(settings)}")
    kind = settings.get("peft_type")
    known = {str(each.value): each for each in PEFT_TYPE_TO_CONFIG_MAPPING}
    if not isinstance(kind, str) or kind not in known:
        raise RunError(f"{where} {file}: {unknown('peft_type', str(kind), known)}")
    kept = PEFT_TYPE_TO_CONFIG_MAPPING[known[kind]]
    for field in dataclasses.fields(kept):
        value = settings.get(field.name)
        given = value is not None or (field.name == "r" and "r" in settings)  # no rank is none
        if given and (wanted := _wanted(field, value)):
            raise RunError(f"{where} {file}: {field.name} is {_shown(value)}; it is to be {wanted}")
    if settings.get("megatron_config"):
        raise RunError(f"{where} {file}: megatron_config has PEFT import a module that it names")
    try:
        config = kept.from_peft_type(**settings)
    except Exception as error:  # every method checks its settings in a way of its own
        raise RunError(f"{where} {file}: PEFT refuses it: {reason_of(error)}") from None
    config.base_model_name_or_path = None
    return config


def _wanted(field: dataclasses.Field[Any], value: Any) -> str | None:
    """What would be right where a value is of another type than the field's default; None if it is
    right. A field that is on by default may name a way to be on."""
    default = field.default
    if field.name in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
        names = value if isinstance(value, list) else [value]
        return None if all(isinstance(name, str) for name in names) else "names of modules"
    if field.name in ("rank_pattern", "alpha_pattern"):
        right = isinstance(value, dict) and all(map(_is_number, value.values()))
        return None if right else "numbers by name"
    if isinstance(default, bool):
        right = isinstance(value, (bool, str) if default else bool)
        return None if right else "true or false"
    if isinstance(default, int | float):
        return None if _is_number(value) else "a number"
    if isinstance(default, str):
        return None if isinstance(value, str) else "text"
    return None


def _is_number(value: Any) -> bool:
    """One that is a float, too, which larger integers are not."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def why_not_merged(config: PeftConfig) -> str | None:
    """Why PEFT cannot merge such an adapter into weights, or not twice alike; None if it can."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt:
        return f"{kind} puts vectors beside the prompt, which are no change of weights"
    if kind in BY_INPUT:
        return f"what {kind} adds depends on the input, so it is no change of weights"
    for name in BY_PROMPT:
        if getattr(config, name, None):
            return f"what it adds depends on the input ({name}), so it is no change of weights"
    if getattr(config, "layer_replication", None):
        return "it runs layers of the base more than once (layer_replication)"
    start = start_of(config)
    if start.startswith(AT_START):
        return (
            f"it began by {start}, which changes the base in a way that no load repeats; convert "
            f"it first: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return None


def bias_missing(config: PeftConfig, model: nn.Module) -> str | None:
    """The first layer of a base without a bias into which such an adapter would merge one; None
    where there is none. Layers chosen by a pattern are not looked for."""
    trains = config.peft_type == "BEFT" or getattr(config, "lora_bias", False)
    targets = getattr(config, "target_modules", None)
    if not trains or targets is None or isinstance(targets, str):
        return None
    endings = tuple(f".{target}" for target in targets)
    bare = (name for name, layer in modules_of(model, nn.Linear) if layer.bias is None)
    return next((name for name in bare if f".{name}".endswith(endings)), None)


def start_of(config: PeftConfig) -> str:
    """The name of how a LoRA began; empty where it has none."""
    start = getattr(config, "init_lora_weights", None)
    return start if isinstance(start, str) else ""


def reason_of(error: Exception) -> str:
    """An error of PEFT on one line."""
    return f"{type(error).__name__}: {one_line(error)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."
