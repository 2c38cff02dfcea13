"""Elastic dimensions: which axis of which linear layers each one cuts.

A dimension is a function of a block of the model and a group's declaration. It answers with the
full size and the cuts a choice makes. A choice k keeps the first `k * unit` rows (axis "out") or
columns (axis "in") of every site's weight, or the first k ranks (axis "rank") of its factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from elastic.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

KEY_VALUE = ("k_proj", "v_proj")


@dataclass(frozen=True)
class Cut:
    """One axis of one linear layer; a choice k keeps its first k * unit entries."""

    site: str
    axis: Literal["out", "in", "rank"]
    unit: int = 1


@dataclass(frozen=True)
class GroupSpec:
    """The declaration of one group per block; names are relative to the block."""

    name: str
    dim: str
    choices: tuple[int | float, ...]
    of: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    align: int = 1

    def resolve(self, full: int, where: str) -> tuple[int, ...]:
        """Absolute choices, descending, the full size among them.

        A fraction is rounded to the nearest multiple of `align` (at least one); an absolute size
        must be a multiple itself.
        """
        sizes = {full}
        for choice in self.choices:
            if choice == 1.0 and isinstance(choice, float):
                continue  # the full size, aligned or not
            if isinstance(choice, float):
                exact = choice * full
                sizes.add(min(full, max(1, round(exact / self.align)) * self.align))
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


def rank(model: nn.Module, block: str, spec: GroupSpec, max_rank: int) -> tuple[int, list[Cut]]:
    """The inner size of the factors of all layers in `of`."""
    return max_rank, [Cut(f"{block}.{name}", "rank") for name in spec.of]


def width(model: nn.Module, block: str, spec: GroupSpec, max_rank: int) -> tuple[int, list[Cut]]:
    """Rows of `outputs` and, with them, columns of `inputs`: the channels of an MLP."""
    cuts = _cuts(block, spec, dict.fromkeys((*spec.outputs, *spec.inputs), 1))
    for cut in cuts:
        head_size = getattr(model.get_submodule(cut.site.rpartition(".")[0]), "head_dim", None)
        if head_size is not None:
            bad = [c for c in spec.choices if isinstance(c, int) and c % head_size]
            raise ConfigError(
                f"group {spec.name!r}: {cut.site} belongs to attention"
                + (f" and {bad[0]} is not divisible by the head size {head_size}" if bad else "")
                + "; declare it with `dim: heads`, whose choices are whole key-value heads"
            )
    return _full(model, spec, cuts), cuts


def heads(model: nn.Module, block: str, spec: GroupSpec, max_rank: int) -> tuple[int, list[Cut]]:
    """Whole key-value heads with the query heads that share them, so that grouped-query
    attention stays valid. A choice counts key-value heads."""
    attention = model.get_submodule(f"{block}.{spec.outputs[0]}".rpartition(".")[0])
    head_size = getattr(attention, "head_dim", None)
    if head_size is None:
        raise ConfigError(f"group {spec.name!r}: {block}.{spec.outputs[0]} is not in attention")
    shared = getattr(attention, "num_key_value_groups", 1)
    units = {
        name: head_size if name.rpartition(".")[2] in KEY_VALUE else head_size * shared
        for name in (*spec.outputs, *spec.inputs)
    }
    cuts = _cuts(block, spec, units)
    return _full(model, spec, cuts), cuts


DIMS = {"rank": rank, "width": width, "heads": heads}


def _cuts(block: str, spec: GroupSpec, units: Mapping[str, int]) -> list[Cut]:
    rows = [Cut(f"{block}.{name}", "out", units[name]) for name in spec.outputs]
    columns = [Cut(f"{block}.{name}", "in", units[name]) for name in spec.inputs]
    return rows + columns


def _full(model: nn.Module, spec: GroupSpec, cuts: list[Cut]) -> int:
    sizes = {}
    for cut in cuts:
        layer = model.get_submodule(cut.site)
        sizes[cut] = (layer.out_features if cut.axis == "out" else layer.in_features) // cut.unit
    if len(set(sizes.values())) != 1:
        found = ", ".join(f"{cut.site} ({cut.axis}) {size}" for cut, size in sizes.items())
        raise ConfigError(f"group {spec.name!r}: sites of one width differ in size: {found}")
    return next(iter(sizes.values()))
