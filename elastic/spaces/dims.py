"""Elastic dimensions: which axis of which linear layers each one cuts, how many blocks run, and how
many tokens the head knows.

A dimension is a function of a block of the model and a group's declaration. It answers with the
full size and the cuts a choice makes. A choice k keeps the first `k * unit` rows (axis "out") or
columns (axis "in") of every site's weight, or the first k ranks (axis "rank") of its factors. Of a
fused layer, whose rows are several projections one after another, it keeps the first of each. Two
groups may cut one axis, one of them its parts and the other within every part: whole key-value
heads, and the query heads of each. What is left is what both keep.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from elastic.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from elastic.spaces.mixtures import Mixture


KEY_VALUE = ("k_proj", "v_proj")
QUERIES = "num_key_value_groups"
"""What attention modules call the number of query heads that share a key-value head."""
HEAD_SIZES = ("v_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
"""What attention modules call the size of a head, that of what its output reads."""
LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_heads")
"""What attention modules know whose keys and values are made from one latent state."""
FIXED_HEADS = ("num_heads", "n_heads", "split_size")
"""Attributes of attention modules whose code counts on all their heads; others take as many as the
projections give."""
Ranges = tuple[tuple[int, int], ...]
"""(start, length) of channels that stay, ascending."""


@dataclass(frozen=True)
class Cut:
    """One axis of one linear layer; a choice k keeps its first k * unit entries."""

    site: str
    axis: Literal["out", "in", "rank"]
    unit: int = 1
    parts: tuple[int, ...] = ()
    """Of an axis of several parts, one after another: what a choice of 1 keeps of each; they sum up
    to the unit. Empty: the axis is one part."""
    apart: bool = False
    """Whether every part has an order of its own, and another group may say how many parts stay;
    else all have the same."""

    def kept(self, choice: int, full: int) -> Ranges:
        """What a choice of `full` keeps of every part."""
        if choice == full:  # in one piece, which is a view
            return ((0, full * self.unit),)
        parts = self.parts or (self.unit,)
        starts = [0, *itertools.accumulate(full * part for part in parts)]
        return tuple((start, choice * part) for start, part in zip(starts, parts, strict=False))


def common(mine: Ranges, theirs: Ranges) -> Ranges:
    """What is in both."""
    pairs = itertools.product(mine, theirs)
    ends = ((max(a, b), min(a + length, b + other)) for (a, length), (b, other) in pairs)
    return tuple((start, end - start) for start, end in ends if start < end)


@dataclass(frozen=True)
class Sites:
    """What a dimension cuts in one block."""

    full: int
    cuts: tuple[Cut, ...]
    counted: tuple[tuple[str, str], ...] = ()
    """Modules and their attributes that must say the choice, as their code reads it."""
    mixtures: tuple[Mixture, ...] = ()
    """Of a dimension of experts: those that it cuts."""
    least: int = 1
    """The smallest choice that the model's code allows."""


@dataclass(frozen=True)
class GroupSpec:
    """The declaration of one group per block, or as `share` says; names are relative to the
    block."""

    name: str
    dim: str
    choices: tuple[int | float, ...]
    of: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    align: int = 1
    fused: Literal["parts", "heads"] | None = None
    """How `outputs` that hold several projections do: one after another, or head by head."""
    share: Literal["layer", "block", "model"] = "block"
    """What has one choice: every layer in `of` on its own (ranks), all of a block, or the same of
    every block."""
    drop_ends: bool = False
    """Of a depth: whether the first and the last block may go too."""
    least: int = 1
    """Of a vocabulary: tokens that the answers need, which stay whatever is chosen."""

    def parted(self) -> list[GroupSpec]:
        """One for each layer on its own, else itself."""
        if self.share != "layer":
            return [self]
        return [replace(self, name=f"{self.name}.{layer}", of=(layer,)) for layer in self.of]

    def resolve(self, full: int, where: str, least: int = 1) -> tuple[int, ...]:
        """Absolute choices, descending, the full size among them.

        A fraction is rounded to the nearest multiple of `align` (at least `least` of them); an
        absolute size must be a multiple itself. ConfigError names the choice that is none, or past
        the full size.
        """
        sizes = {full}
        for choice in self.choices:
            if choice == 1.0 and isinstance(choice, float):
                continue  # the full size, aligned or not
            if isinstance(choice, float):
                exact = choice * full
                sizes.add(min(full, max(least, round(exact / self.align)) * self.align))
                continue
            if choice > full:
                limit = "the super-adapter's max_rank" if self.dim == "rank" else "the full size"
                advice = f", or train with adapter.rank={choice}" if self.dim == "rank" else ""
                raise ConfigError(
                    f"{where}: {self.dim} {choice} exceeds {limit} {full}; "
                    f"choose from 1..{full}{advice}"
                )
            if choice % self.align and choice != full:
                raise ConfigError(
                    f"{where}: {self.dim} {choice} is not divisible by align {self.align}; "
                    f"nearest: {choice // self.align * self.align or self.align}"
                )
            sizes.add(choice)
        return tuple(sorted(sizes, reverse=True))


def rank(model: nn.Module, block: str, spec: GroupSpec, max_rank: int) -> Sites:
    """The inner size of the factors of all layers in `of`."""
    return Sites(max_rank, tuple(Cut(f"{block}.{name}", "rank") for name in spec.of))


def width(model: PreTrainedModel, block: str, spec: GroupSpec, max_rank: int) -> Sites:
    """Rows of `outputs` and, with them, columns of `inputs`: the channels of an MLP;
    ConfigError for those of attention."""
    parts: dict[str, tuple[int, ...]] = dict.fromkeys((*spec.outputs, *spec.inputs), (1,))
    if spec.fused:
        channels = model.get_submodule(f"{block}.{spec.inputs[0]}").in_features
        for name in spec.outputs:
            rows = model.get_submodule(f"{block}.{name}").out_features
            parts[name] = (1,) * (rows // channels)
    cuts = _cuts(block, spec, parts)
    for cut in cuts:
        head_size = head_size_of(model.get_submodule(cut.site.rpartition(".")[0]))
        if head_size is not None:
            bad = [c for c in spec.choices if isinstance(c, int) and c % head_size]
            raise ConfigError(
                f"group {spec.name!r}: {cut.site} belongs to attention"
                + (f" and {bad[0]} is not divisible by the head size {head_size}" if bad else "")
                + "; declare it with `dim: heads`, whose choices are whole key-value heads"
            )
    return Sites(_full(model, spec, cuts), cuts)


def heads(model: PreTrainedModel, block: str, spec: GroupSpec, max_rank: int) -> Sites:
    """Whole key-value heads with the query heads that share them, so that grouped-query
    attention stays valid. A choice counts key-value heads; ConfigError where they cannot be cut."""
    name, attention, head_size = _attention(model, block, spec)
    shared = getattr(attention, QUERIES, 1)
    units = dict.fromkeys(spec.inputs, head_size * shared)
    layers = {
        name: model.get_submodule(f"{block}.{name}") for name in (*spec.outputs, *spec.inputs)
    }
    full = layers[spec.inputs[0]].in_features // (head_size * shared)
    for name in spec.outputs:
        rows = layers[name].out_features
        if not full or rows % full:
            raise ConfigError(
                f"group {spec.name!r}: {block}.{name} makes {rows} channels, which are no multiple "
                f"of the {full} key-value heads that {block}.{spec.inputs[0]} reads"
            )
        # Of a head, beside its channels, its gates; of latent attention, keys and values together.
        units[name] = rows // full
    cuts = _cuts(block, spec, {name: (unit,) for name, unit in units.items()})
    return Sites(_full(model, spec, cuts), cuts)


def query_heads(model: PreTrainedModel, block: str, spec: GroupSpec, max_rank: int) -> Sites:
    """Query heads of every key-value head alike. A choice counts those of one key-value head,
    which keeps its own most important ones. ConfigError for attention that does not group them."""
    name, attention, head_size = _attention(model, block, spec)
    shared = getattr(attention, QUERIES, None)
    if shared is None or spec.fused:
        raise ConfigError(
            f"group {spec.name!r}: {type(attention).__name__} does not say how many query heads "
            "share a key-value head, or keeps them in one layer with the keys; declare `dim: heads`"
        )
    layer, reader = (
        model.get_submodule(f"{block}.{name}") for name in (spec.outputs[0], spec.inputs[0])
    )
    if layer.out_features > reader.in_features:
        raise ConfigError(
            f"group {spec.name!r}: {block}.{spec.outputs[0]} makes {layer.out_features} channels, "
            f"of which {block}.{spec.inputs[0]} reads {reader.in_features}: its query heads hold "
            "more than queries; declare `dim: heads`"
        )
    parts = (head_size,) * (layer.out_features // (head_size * shared))
    found = _cuts(block, spec, dict.fromkeys((*spec.outputs, *spec.inputs), parts))
    cuts = tuple(replace(cut, apart=True) for cut in found)
    return Sites(_full(model, spec, cuts), cuts, ((name, QUERIES),))


DIMS = {"rank": rank, "width": width, "heads": heads, "query_heads": query_heads}
"""Those of one block."""
DEPTH = "depth"
"""A choice counts the blocks that run."""
VOCABULARY = "vocab"
"""A choice counts the rows of the language-model head that are computed, one for each token."""
BITS = "bits"
"""A choice is that of every weight of the model: it cuts nothing, and training knows none."""


def _attention(model: nn.Module, block: str, spec: GroupSpec) -> tuple[str, nn.Module, int]:
    """Name, module and head size of the attention that a group cuts; ConfigError if its heads
    cannot be cut."""
    name = f"{block}.{spec.outputs[0]}".rpartition(".")[0]
    attention = model.get_submodule(name)
    head_size = head_size_of(attention)
    if head_size is None:
        raise ConfigError(f"group {spec.name!r}: {block}.{spec.outputs[0]} is not in attention")
    fixed = [] if is_latent(attention) else [n for n in FIXED_HEADS if hasattr(attention, n)]
    if fixed or spec.fused == "parts":
        raise ConfigError(
            f"group {spec.name!r}: the code of {type(attention).__name__} counts on all its heads; "
            "declare ranks and the width of its MLP instead"
        )
    return name, attention, head_size


def numbers(blocks: Iterable[str]) -> list[int]:
    """Places of blocks in their list, from their names."""
    return [int(block.rpartition(".")[2]) for block in blocks]


def places(blocks: Sequence[str]) -> list[int]:
    """Of each among these blocks of one list, in the list's order."""
    place = {number: at for at, number in enumerate(sorted(numbers(blocks)))}
    return [place[number] for number in numbers(blocks)]


def head_size_of(attention: nn.Module) -> int | None:
    """Channels of one attention head."""
    return next((getattr(attention, name) for name in HEAD_SIZES if hasattr(attention, name)), None)


def is_latent(attention: nn.Module) -> bool:
    """Whether keys and values of all its heads are made from one latent state."""
    return all(hasattr(attention, name) for name in LATENT)


def _cuts(block: str, spec: GroupSpec, parts: Mapping[str, tuple[int, ...]]) -> tuple[Cut, ...]:
    """`parts`: what a choice of 1 keeps of each part of a layer, by its name."""

    def cut(name: str, axis: Literal["out", "in"]) -> Cut:
        own = parts[name]
        return Cut(f"{block}.{name}", axis, sum(own), own if len(own) > 1 else ())

    made = [cut(name, "out") for name in spec.outputs]
    return (*made, *(cut(name, "in") for name in spec.inputs))


def _full(model: PreTrainedModel, spec: GroupSpec, cuts: Sequence[Cut]) -> int:
    sizes: dict[Cut, int] = {}
    for cut in cuts:
        layer = model.get_submodule(cut.site)
        sizes[cut] = (layer.out_features if cut.axis == "out" else layer.in_features) // cut.unit
    if len(set(sizes.values())) != 1:
        found = ", ".join(f"{cut.site} ({cut.axis}) {size}" for cut, size in sizes.items())
        raise ConfigError(f"group {spec.name!r}: sites of one width differ in size: {found}")
    return next(iter(sizes.values()))


def channel_index(order: Tensor, cut: Cut) -> Tensor:
    """The permutation of the channels of an axis, (n * unit,), that moves whole units: in each part
    of it alike, in this order (n,), or each in its own, (parts, n)."""
    parts = cut.parts or (cut.unit,)
    found, start = [], 0
    for part, own in zip(parts, order.expand(len(parts), -1), strict=True):
        found.append(start + (own[:, None] * part + torch.arange(part)).flatten())
        start += part * len(own)
    return torch.cat(found)
