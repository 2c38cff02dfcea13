"""The blocks of a model: what says how many there are and of which kind each is, and whether some
may be left out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from elastic.errors import ConfigError
from elastic.spaces.dims import numbers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


COUNTS = ("num_hidden_layers", "encoder_layers")
DECODER_COUNTS = ("num_decoder_layers", "decoder_layers")
"""What configs call the number of blocks; that of a stack of its own says COUNTS."""
LEADING = ("first_k_dense_replace", "num_dense_layers")
"""What configs call the number of first blocks that are of another kind than the rest."""
NUMBERS = ("layer_idx", "layer_id")
"""What modules call the place of their block, by which they find their part of the cache."""


def counts(model: PreTrainedModel, blocks: str, full: int) -> list[tuple[PretrainedConfig, str]]:
    """Configs, and their keys, that say how many blocks the list of that name has."""
    stack = model.get_submodule(blocks.rpartition(".")[0])
    decodes = model.config.is_encoder_decoder and "decoder" in blocks.split(".")
    # Of a language model inside of another class, the part of its own.
    own = (model.config, model.config.get_text_config(), getattr(stack, "config", None))
    configs = {id(config): config for config in own}
    found = []
    for config in configs.values():
        for key in DECODER_COUNTS if decodes and config is model.config else COUNTS:
            if getattr(config, key, None) == full:
                found.append((config, key))
                break
    return found


def described(values: Mapping[str, Any], kept: Sequence[int], full: int) -> dict[str, Any]:
    """What a config that says `values` of `full` blocks says where those in these places are all:
    of every one, such as its kind of attention; which ones, by number; how many first ones. Nothing
    of what stays the same. `kept` ascends."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in LEADING and type(value) is int:
            found[key] = sum(number < value for number in kept)
        elif not isinstance(value, list) or not ("layer" in key or "idx" in key):
            continue
        elif _are_numbers(value, full):
            found[key] = [place for place, number in enumerate(kept) if number in value]
        elif len(value) == full:
            found[key] = [value[number] for number in kept]
    return found


def _are_numbers(value: list[Any], full: int) -> bool:
    """Whether a list holds numbers of blocks, rather than something of each."""
    ints = all(type(item) is int and 0 <= item < full for item in value)
    return ints and sorted(set(value)) == value


def blocks_of(model: PreTrainedModel, blocks: Sequence[str], where: str) -> int:
    """How many blocks the list has that these are of; ConfigError unless they are several of one
    list."""
    parents = {block.rpartition(".")[0] for block in blocks}
    parent = min(parents)
    whole = model.get_submodule(parent)
    if len(parents) > 1 or not isinstance(whole, nn.ModuleList) or len(blocks) < 2:
        raise ConfigError(
            f"{where}: {', '.join(blocks[:3])}: a depth counts several blocks of one list; name "
            "more of them, or leave it out"
        )
    return len(whole)


def require_described(
    model: PreTrainedModel, going: tuple[str, ...], most: int, where: str
) -> None:
    """ConfigError unless the configuration of the model can describe it without any of these blocks
    of one list, up to so many of them: the blocks that are left are then built as they are."""
    if not going or not most:
        return
    parent, name = going[0].rpartition(".")[0], type(model).__name__
    full = len(model.get_submodule(parent))
    said = (model.config, model.config.get_text_config())
    keys = [k for config, k in counts(model, parent, full) if any(config is s for s in said)]
    if not keys:
        raise ConfigError(
            f"{where}: the configuration of {name} does not say how many blocks {parent} has"
        )
    if getattr(said[1], "scale_attn_by_inverse_layer_idx", False):
        raise ConfigError(
            f"{where}: the code of {name} computes with the numbers of its blocks, so none can be "
            "left out; declare ranks and widths instead"
        )
    whole = _built(model, {})
    for gone in dict.fromkeys((going[:1], going[-1:], going[:most])):
        out = set(numbers(gone))
        kept = [number for number in range(full) if number not in out]
        told = vars(model.config) | vars(said[1])
        values = {keys[0]: len(kept), **described(told, kept, full)}
        try:
            small = _built(model, values)
        except Exception as error:  # whatever the model's code says of such a configuration
            raise ConfigError(f"{where}: no {name} of {len(kept)} blocks: {error}") from None
        _require_same(whole, small, parent, kept, gone, where)


def _built(model: PreTrainedModel, values: Mapping[str, Any]) -> PreTrainedModel:
    """A model of this class without memory, its config, or what that says of its language model,
    changed by these values."""
    config = copy.deepcopy(model.config)
    for key, value in values.items():
        setattr(config if hasattr(config, key) else config.get_text_config(), key, value)
    with torch.device("meta"):
        return type(model)(config)


def _require_same(
    whole: PreTrainedModel,
    small: PreTrainedModel,
    parent: str,
    kept: Sequence[int],
    gone: Sequence[str],
    where: str,
) -> None:
    """ConfigError unless `small` has the blocks of `whole` in these places, and all that stands
    outside of them."""
    before, after = whole.get_submodule(parent), small.get_submodule(parent)
    for place, number in enumerate(kept):
        one, other = (dict(_made_of(block)) for block in (before[number], after[place]))
        if strange := [key for key in one | other if one.get(key) != other.get(key)]:
            has_end = set(numbers(gone)) & {0, len(before) - 1}
            advice = "; leave drop_ends out" if has_end else "; declare no depth for these blocks"
            raise ConfigError(
                f"{where}: without {gone[0]}, {parent}.{number} is built otherwise "
                f"({strange[0]}): the configuration of {type(whole).__name__} gives kinds to its "
                f"blocks by a rule that knows no gaps{advice}"
            )
    sizes, own = (
        {key: x.shape for key, x in each.named_parameters() if not key.startswith(f"{parent}.")}
        for each in (small, whole)
    )
    if strange := [key for key in own if sizes.get(key) != own[key]]:
        raise ConfigError(
            f"{where}: {strange[0]} of {type(whole).__name__} has a part for every block, so none "
            "can be left out"
        )


def _made_of(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """Shapes of parameters and plain settings of modules, without the number of the block."""
    for key, parameter in block.named_parameters():
        yield key, parameter.shape
    for name, module in block.named_modules():
        yield name, type(module)
        for key, value in settings_of(module).items():
            yield f"{name}.{key}", value


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Plain attributes of a module, without the number of its block."""
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and key not in NUMBERS
    }
