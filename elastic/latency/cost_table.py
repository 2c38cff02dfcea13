"""What every choice costs: additive, fitted to a few whole models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic.latency.additive import Additive
from elastic.spaces.bound import Point, Space
from elastic.spaces.candidates import WHOLE
from elastic.spaces.dims import BITS, VOCABULARY

NOISE = 0.01
"""Standard deviation of one measured latency, in parts of it."""


def kinds(space: Space[Any]) -> list[str]:
    """What groups are alike: those of one name but for the block's number."""
    names = [
        [part for part in group.name.split(".") if not (part.isdigit() or part == "*")]
        for group in space
        if group.dim != BITS
    ]
    columns = zip(*(name[:-1] for name in names), strict=False)
    shared = len(list(itertools.takewhile(lambda parts: len(set(parts)) == 1, columns)))
    bits = [group.name for group in space if group.dim == BITS]
    return [".".join(name[shared:]) for name in names] + bits


def shares(space: Space[Any]) -> list[list[float]]:
    """The choices of every group as parts of its full size; of bits, what rounding leaves exact."""
    return [
        [1 - 2.0**-choice if group.dim == BITS else choice / group.choices[0]
         for choice in group.choices]
        for group in space
    ]  # fmt: skip


def places(space: Space[Point], points: Sequence[Point]) -> np.ndarray:
    """(points, groups) of indices into each group's choices."""
    return np.array([list(space.indices(point).values()) for point in points], dtype=np.int64)


def pinned(space: Space[Any], costs: np.ndarray) -> Iterator[np.ndarray]:
    """The costs (groups, choices) for one depth after another: infinite where a choice is another
    depth, or of a group whose blocks do not run. Without depths, as they are."""
    rows = {group.name: row for row, group in enumerate(space)}
    for depths in itertools.product(*(range(len(group.choices)) for group in space.depths)):
        own = costs.copy() if depths else costs
        at = {group.name: choice for group, choice in zip(space.depths, depths, strict=True)}
        for name, choice in at.items():
            own[rows[name], np.arange(costs.shape[1]) != choice] = np.inf
        for name in space.gone(at):
            own[rows[name], 1:] = np.inf
        yield own


def least(alternatives: Iterable[np.ndarray]) -> float:
    """The lowest sum of what a sub-adapter chooses of any of these (groups, choices)."""
    return min(float(own.min(1).sum()) for own in alternatives)


@dataclass(frozen=True)
class Table:
    """Latency (or memory) of a sub-adapter: the full model's, less what every choice saves.

    Ranks of merged ones save nothing, since their factors are gone.
    """

    space: Space[Any]
    full: float
    """Milliseconds of the full model, as fitted."""
    effects: np.ndarray
    """(groups, choices): milliseconds, at most 0 but of a vocabulary; 0 at full size, infinite
    where no choice is."""

    @classmethod
    def fit(
        cls, space: Space[Point], measured: Mapping[Point, float], *, merged: bool = True
    ) -> Table:
        """Of latencies in milliseconds; the more of the range they cover, the better."""
        at, values = places(space, list(measured)), np.array(list(measured.values()))
        costly = np.array([group.dim != "rank" or not merged for group in space])
        effects = np.zeros((len(space.groups), max(len(group.choices) for group in space)))
        full = float(values.mean())
        if costly.any() and len(values) > 1 and values.any():
            names = [kind for kind, costs in zip(kinds(space), costly, strict=True) if costs]
            sizes = [share for share, costs in zip(shares(space), costly, strict=True) if costs]
            noise = (NOISE * values.mean()) ** 2
            found = Additive(names, sizes).fit(at[:, costly], values, noise)
            effects[costly, : found.effects.shape[1]] = found.effects
            # A cut head takes memory of its own where the whole one is the embeddings.
            saving = np.array([group.dim != VOCABULARY for group in space])
            effects[saving] = np.minimum(effects[saving], 0)
            full = float(found.offset)
        for row, group in zip(effects, space, strict=True):
            row[len(group.choices) :] = np.inf
        return cls(space, full, effects)

    @classmethod
    def counted(cls, space: Space[Point], cost: Callable[[Point], float]) -> Table:
        """Of a cost that can be asked for any candidate: what every choice saves on its own."""
        at = space.indices(space.maximal())
        full = cost(space.maximal())
        effects = np.full((len(space.groups), max(len(group.choices) for group in space)), np.inf)
        for row, group in zip(effects, space, strict=True):
            for choice in range(len(group.choices)):
                row[choice] = cost(space.at({**at, group.name: choice})) - full
        return cls(space, full, effects)

    def alternatives(self) -> Iterator[np.ndarray]:
        """`pinned` effects: within one of these, every group can choose on its own."""
        return pinned(self.space, self.effects)

    def __call__(self, point: Any) -> float:
        """Milliseconds, or whatever else it was told."""
        at = places(self.space, [point])[0]
        return self.full + float(self.effects[np.arange(len(at)), at].sum())


@dataclass(frozen=True)
class Tables:
    """One table per number of bits, as one of the space that has them to choose from: what a choice
    saves differs with the precision."""

    space: Space[Any]
    by_bits: Mapping[int, Table]
    """Of the space without them."""

    def alternatives(self) -> Iterator[np.ndarray]:
        """(groups, choices) less the full, uncompressed model's, for one precision after another:
        infinite where a choice is another one."""
        [bits] = (group for group in self.space if group.dim == BITS)
        width = max(len(group.choices) for group in self.space)
        for index, choice in enumerate(bits.choices):
            table = self.by_bits[choice]
            costs = np.full((len(self.space.groups), width), np.inf)
            costs[:-1, : table.effects.shape[1]] = table.effects
            costs[-1, index] = table.full - self.by_bits[WHOLE].full
            yield from pinned(self.space, costs)
