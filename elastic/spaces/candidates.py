"""The space of a search: sub-adapters, and the precision of their weights as one more group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastic.spaces.bound import BoundSpace, Candidate, Group, Space, SubAdapter
from elastic.spaces.dims import BITS

WHOLE = 32
"""Bits of a weight that is not compressed."""


def bits_of(mode: str | None) -> int:
    """Of a weight in a mode of `elastic.formats.compression`."""
    return WHOLE if mode is None else int(mode.removeprefix("int").partition("_")[0])


@dataclass(frozen=True)
class CandidateSpace(Space[Candidate]):
    """The space of a search, whose points are candidates: where there are modes to choose from, the
    number of bits is one more group."""

    modes: tuple[str | None, ...] = (None,)
    """In the order of that group's choices."""

    @classmethod
    def of(cls, space: BoundSpace, modes: Sequence[str]) -> CandidateSpace:
        """Sub-adapters as they are and in these modes, of which no two have the same bits."""
        ordered = tuple(sorted([None, *modes], key=bits_of, reverse=True))
        bits = (Group(BITS, BITS, tuple(map(bits_of, ordered)), ()),) if modes else ()
        return cls((*space.groups, *bits), space.targets, space.adapted, ordered)

    def at(self, indices: Mapping[str, int]) -> Candidate:
        choices = self._sizes(indices).as_dict()
        choices.pop(BITS, None)
        return Candidate(SubAdapter(tuple(choices.items())), self.modes[indices.get(BITS, 0)])

    def indices(self, point: Candidate) -> dict[str, int]:
        bits = (BITS, bits_of(point.compress))
        choices = point.sub_adapter.choices
        return self._indices(SubAdapter((*choices, bits) if len(self.modes) > 1 else choices))
