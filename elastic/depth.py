"""Depth: a model that runs some of its blocks and leaves the others out.

Blocks pass on what they add to, so a model without some of them still fits together. All of them
stay where they are and keep their names, so factors, checkpoints and wrappers find them; the code
of the model sees those that run, numbered anew.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elastic.errors import ConfigError
from elastic.modules import modules_of, replace_module

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from elastic.space import Group

NUMBERS = ("layer_idx", "layer_id")
"""What modules call the place of their block, by which they find their part of the cache."""
COUNTS = ("num_hidden_layers", "encoder_layers")
DECODER_COUNTS = ("num_decoder_layers", "decoder_layers")
"""What configs call the number of blocks; that of a stack of its own says COUNTS."""


class Blocks(nn.ModuleList):
    """All blocks of a stack, which looks like a list of those that run."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.running: tuple[int, ...] = ()
        super().__init__(blocks)
        self.running = tuple(range(len(blocks)))

    def __len__(self) -> int:
        return len(self.running)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self._modules[str(number)] for number in self.running)

    def __getitem__(self, index: int | slice) -> Any:
        return list(self)[index]


class Stack:
    """The blocks of one group, with all that says how many there are."""

    def __init__(self, model: PreTrainedModel, group: Group) -> None:
        name = group.blocks[0].rpartition(".")[0]
        self.blocks = Blocks(list(model.get_submodule(name)))
        replace_module(model, name, self.blocks)
        self._numbered = [
            [
                (module, name)
                for module in block.modules()
                for name in NUMBERS
                if isinstance(getattr(module, name, None), int)
            ]
            for block in self.blocks
        ]
        self._counts = counts(model, name, len(self.blocks))
        self._lists = [
            (config, key, values)
            for config, _ in self._counts
            for key, values in _by_layer(config, len(self.blocks))
        ]

    def run(self, kept: Sequence[int]) -> None:
        """Let the blocks in these places, ascending, run."""
        self.blocks.running = tuple(kept)
        for place, number in enumerate(self.blocks.running):
            for module, name in self._numbered[number]:
                setattr(module, name, place)
        for config, key in self._counts:
            setattr(config, key, len(kept))
        for config, key, values in self._lists:
            setattr(config, key, [values[number] for number in self.blocks.running])


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
    for key, values in _by_layer(config, len(blocks)):
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


def _by_layer(config: PretrainedConfig, full: int) -> list[tuple[str, list]]:
    """What a config says of every block, such as its kind of attention."""
    return [
        (key, list(value))
        for key, value in vars(config).items()
        if "layer" in key and isinstance(value, list) and len(value) == full
    ]


def settle_(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every list of which some blocks run by a plain one of those, in place."""
    for name, blocks in modules_of(model, Blocks):
        replace_module(model, name, nn.ModuleList(list(blocks)))
    return model


def running(blocks: nn.ModuleList) -> dict[str, nn.Module]:
    """The blocks that run, by their names in the list."""
    names = blocks.running if isinstance(blocks, Blocks) else range(len(blocks))
    return {str(number): block for number, block in zip(names, blocks, strict=True)}


def renamed(kept: Mapping[str, Sequence[int]], name: str) -> str | None:
    """What a module, or its tensor, is called where only the blocks in these places of every list
    are left; None if it is gone."""
    for blocks, left in kept.items():
        if name.startswith(f"{blocks}."):
            number, dot, rest = name.removeprefix(f"{blocks}.").partition(".")
            if int(number) not in left:
                return None
            return f"{blocks}.{left.index(int(number))}{dot}{rest}"
    return name


def original(kept: Mapping[str, Sequence[int]], name: str) -> str:
    """What a module, or its tensor, was called before only these blocks were left: the inverse of
    `renamed`."""
    for blocks, left in kept.items():
        if name.startswith(f"{blocks}."):
            number, dot, rest = name.removeprefix(f"{blocks}.").partition(".")
            return f"{blocks}.{left[int(number)]}{dot}{rest}"
    return name


def states(inputs: tuple, given: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    """Hidden states (batch, ..., features) before and after a block, from what a forward hook is
    told."""
    before = inputs[0] if inputs else given["hidden_states"]
    return before, output[0] if isinstance(output, tuple) else output
