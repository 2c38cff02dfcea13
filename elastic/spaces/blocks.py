"""The blocks of a model: what says how many there are, and whether some may be left out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from elastic.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


COUNTS = ("num_hidden_layers", "encoder_layers")
DECODER_COUNTS = ("num_decoder_layers", "decoder_layers")
"""What configs call the number of blocks; that of a stack of its own says COUNTS."""


def counts(model: PreTrainedModel, blocks: str, full: int) -> list[tuple[PretrainedConfig, str]]:
    """Configs, and their keys, that say how many blocks the list of that name has."""
    stack = model.get_submodule(blocks.rpartition(".")[0])
    decodes = model.config.is_encoder_decoder and "decoder" in blocks.split(".")
    configs = {id(config): config for config in (model.config, getattr(stack, "config", None))}
    found = []
    for config in configs.values():
        own = decodes and config is model.config
        for key in DECODER_COUNTS if own else COUNTS:
            if getattr(config, key, None) == full:
                found.append((config, key))
                break
    return found


def require_alike(
    model: PreTrainedModel, blocks: Sequence[str], least: int, where: str, *, ends: bool
) -> None:
    """ConfigError unless a model of this class may have fewer of these blocks, any of them (with
    `ends` the first and the last, too), down to `least`."""
    parent, name = blocks[0].rpartition(".")[0], type(model).__name__
    whole = model.get_submodule(parent)
    if not isinstance(whole, nn.ModuleList) or len(whole) != len(blocks) or len(blocks) < 2:
        raise ConfigError(
            f"{where}: {parent} is no list of several blocks, or has others; name all of it"
        )
    keys = [key for config, key in counts(model, parent, len(blocks)) if config is model.config]
    if not keys:
        raise ConfigError(
            f"{where}: the configuration of {name} does not say how many blocks {parent} has"
        )
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise ConfigError(
            f"{where}: the code of {name} computes with the numbers of its blocks, so none can be "
            "left out; declare ranks and widths instead"
        )
    parts = [{key: tuple(x.shape) for key, x in block.named_parameters()} for block in whole]
    usual, free = parts[len(parts) // 2], range(len(parts)) if ends else range(1, len(parts) - 1)
    for number in free:
        if parts[number] != usual:
            strange = sorted(parts[number].items() ^ usual.items())
            advice = "; leave drop_ends out" if number in (0, len(parts) - 1) else ""
            raise ConfigError(
                f"{where}: {parent}.{number} is built otherwise than the others "
                f"({strange[0][0]}), so which one may go is not free{advice}"
            )
    config = copy.deepcopy(model.config)
    setattr(config, keys[0], least)
    for key, values in by_layer(config, len(blocks)):
        setattr(config, key, values[:least])
    try:
        with torch.device("meta"):
            small = type(model)(config)
    except Exception as error:  # whatever the model's code says of such a configuration
        raise ConfigError(f"{where}: no {name} of {least} blocks: {error}") from None
    sizes, own = (
        {key: x.shape for key, x in each.named_parameters() if not key.startswith(f"{parent}.")}
        for each in (small, model)
    )
    if strange := [key for key in sizes.keys() & own.keys() if sizes[key] != own[key]]:
        raise ConfigError(
            f"{where}: {strange[0]} of {name} has a part for every block, so none can be left out"
        )


def by_layer(config: PretrainedConfig, full: int) -> list[tuple[str, list[Any]]]:
    """What a config says of every block, such as its kind of attention."""
    return [
        (key, list(value))
        for key, value in vars(config).items()
        if "layer" in key and isinstance(value, list) and len(value) == full
    ]
