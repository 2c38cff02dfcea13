"""Bits per weight as one more choice of the search: a group beside those that cut.

It stands last, has one choice for the whole model, and no supernet knows it: what is proposed is
split into a sub-adapter and the compression of its graph.
"""

from __future__ import annotations

from collections.abc import Sequence

from elastic.dims import BITS
from elastic.space import BoundSpace, Group, SubAdapter

WHOLE = 32
"""Bits of a weight that is not compressed."""


def bits_of(mode: str | None) -> int:
    """Of a weight in a mode of `elastic.compression`."""
    return WHOLE if mode is None else int(mode.removeprefix("int").partition("_")[0])


def with_bits(space: BoundSpace, modes: Sequence[str]) -> BoundSpace:
    """The space whose sub-adapters may be compressed in these modes, too, of which no two have the
    same bits; itself without any."""
    if not modes:
        return space
    choices = sorted({WHOLE, *map(bits_of, modes)}, reverse=True)
    return BoundSpace((*space.groups, Group(BITS, BITS, tuple(choices), ())), space.targets)


def split(point: SubAdapter, modes: Sequence[str]) -> tuple[SubAdapter, str | None]:
    """What is cut, and how it is compressed, of a point of that space."""
    if not modes:
        return point, None
    *cut, (_, bits) = point.choices
    return SubAdapter(tuple(cut)), {bits_of(mode): mode for mode in modes}.get(bits)


def smallest(space: BoundSpace) -> list[SubAdapter]:
    """Everything at its smallest, at every number of bits: fewer bits are smaller, not faster."""
    least = space.indices(space.minimal())
    if BITS not in least:
        return [space.minimal()]
    return [space.at({**least, BITS: i}) for i in range(len(space.groups[-1].choices))]
