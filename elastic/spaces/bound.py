"""The search space of one model: groups of sites that share one choice, and its points.

A `SubAdapter` is one choice per group, immutable and hashable, and everything that varies is a
function of it.
"""

from __future__ import annotations

import itertools
import json
import math
import random as random_module
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from elastic.errors import ConfigError, RunError, unknown
from elastic.files import read_json
from elastic.spaces.dims import DEPTH, VOCABULARY, Cut, Ranges, common, numbers, places

if TYPE_CHECKING:
    from torch import Tensor

    from elastic.spaces.mixtures import Mixture


@dataclass(frozen=True)
class SubAdapter:
    """A choice per group: absolute sizes by group name, in the order of the space."""

    choices: tuple[tuple[str, int], ...]

    def __getitem__(self, group: str) -> int:
        return self._by_name[group]

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return dict(self.choices)

    def as_dict(self) -> dict[str, int]:
        """Group to choice, as files have it."""
        return dict(self.choices)

    @classmethod
    def read(cls, path: Path | str) -> SubAdapter:
        """From a JSON file as the search writes it; RunError if it is something else."""
        return Candidate.of(read_json(path), path).sub_adapter

    def __str__(self) -> str:
        return json.dumps(self.as_dict())


@dataclass(frozen=True)
class Candidate:
    """A sub-adapter and the precision of its weights: what is scored, timed and exported."""

    sub_adapter: SubAdapter
    compress: str | None = None
    """A mode of `elastic.formats.compression`; None: as they are."""

    @classmethod
    def of(cls, value: Any, where: Path | str) -> Candidate:
        """Of what such a file holds: sizes by group, alone or beside more; else RunError."""
        choices = value.get("sub_adapter", value) if isinstance(value, dict) else None
        if not isinstance(choices, dict) or not all(type(c) is int for c in choices.values()):
            raise RunError(f"{where}: not a sub-adapter; expected a JSON object of group: size")
        return cls(SubAdapter(tuple(choices.items())), value.get("compress"))

    def as_dict(self) -> dict[str, Any]:
        return {"compress": self.compress, "sub_adapter": self.sub_adapter.as_dict()}

    def __str__(self) -> str:
        return f"{self.sub_adapter} {self.compress or ''}".strip()


Point = TypeVar("Point", SubAdapter, Candidate)
"""What a space has: sub-adapters, or in a search candidates."""


@dataclass(frozen=True)
class Group:
    """Sites that share one choice. `choices` are absolute and descend from the full size."""

    name: str
    dim: str
    choices: tuple[int, ...]
    cuts: tuple[Cut, ...]
    counted: tuple[tuple[str, str], ...] = ()
    """Modules and their attributes that must say the choice."""
    blocks: tuple[str, ...] = ()
    """Of a depth: a choice of k runs the first k of these."""
    staying: int = 0
    """How many of the first blocks stay, whatever the order of the others."""
    listed: int = 0
    """How many blocks their list has, those of other groups and of none among them."""
    head: str = ""
    """Of a vocabulary: the layer of which a choice of k computes the rows of the first k tokens."""
    mixtures: tuple[Mixture, ...] = ()
    """Of a dimension of experts: those that it cuts."""

    def joined(self, before: Group, where: str) -> Group:
        """One choice for both; ConfigError if their sizes differ."""
        if before.choices != self.choices:
            raise ConfigError(
                f"{where}: share model: blocks have {list(before.choices)} and "
                f"{list(self.choices)} to choose from; share what has one size, or per block"
            )
        both = before.counted + self.counted
        mixtures = before.mixtures + self.mixtures
        return replace(self, cuts=before.cuts + self.cuts, counted=both, mixtures=mixtures)


@dataclass(frozen=True)
class Space(Generic[Point]):
    """Groups with their choices on one model; what its points are, `at` and `indices` say."""

    groups: tuple[Group, ...]
    targets: tuple[str, ...]
    """Linear layers that carry factors, and matrices of all experts that do."""
    adapted: tuple[Mixture, ...] = ()
    """The mixtures of such matrices, cut or not."""

    @cached_property
    def size(self) -> int:
        """How many sub-adapters there are."""
        total = 0
        for depths in itertools.product(*(range(len(group.choices)) for group in self.depths)):
            at = {group.name: choice for group, choice in zip(self.depths, depths, strict=True)}
            gone = self.gone(at)
            left = (g for g in self.groups if g.dim != DEPTH and g.name not in gone)
            total += math.prod(len(group.choices) for group in left)
        return total

    @cached_property
    def axes(self) -> dict[tuple[str, str], list[tuple[Group, Cut]]]:
        """By layer and axis ("out" or "in"), the groups that cut it."""
        found: dict[tuple[str, str], list[tuple[Group, Cut]]] = {}
        for group in self.groups:
            for cut in group.cuts:
                if cut.axis != "rank":
                    found.setdefault((cut.site, cut.axis), []).append((group, cut))
        return found

    @cached_property
    def reading(self) -> tuple[str, ...]:
        """Layers whose columns can be cut."""
        return tuple(site for site, axis in self.axes if axis == "in")

    @cached_property
    def mixtures(self) -> dict[str, tuple[Mixture, dict[str, Group]]]:
        """By the name of every module of experts that is cut: what it is, and by dimension the
        groups that cut it."""
        found: dict[str, tuple[Mixture, dict[str, Group]]] = {}
        for group in self.groups:
            for mixture in group.mixtures:
                found.setdefault(mixture.experts, (mixture, {}))[1][group.dim] = group
        return found

    @cached_property
    def _adapted(self) -> dict[str, Mixture]:
        return {mixture.experts: mixture for mixture in self.adapted}

    def experts_of(self, target: str) -> Mixture | None:
        """The mixture to whose experts a target belongs; None of a linear layer."""
        return self._adapted.get(target.rpartition(".")[0])

    def is_leading(self, cut: Cut) -> bool:
        """Whether what is left of its axis are the first channels, whatever is chosen."""
        return not cut.parts and len(self.axes.get((cut.site, cut.axis), ())) < 2

    def left(self, sub: SubAdapter, site: str, axis: str) -> Ranges:
        """The channels of an axis that `sub` leaves: those that every cut of it keeps."""
        cuts = self.axes[site, axis]
        return reduce(common, (cut.kept(sub[group.name], group.choices[0]) for group, cut in cuts))

    @cached_property
    def depths(self) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.dim == DEPTH)

    @cached_property
    def vocabulary(self) -> Group | None:
        """The group that says how many tokens the head computes; None where it computes all."""
        return next((group for group in self.groups if group.dim == VOCABULARY), None)

    def cuts_vocabulary(self, sub: SubAdapter) -> bool:
        """Whether the head of `sub` computes some tokens alone."""
        group = self.vocabulary
        return group is not None and sub[group.name] < group.choices[0]

    def with_whole_vocabulary(self, sub: SubAdapter) -> SubAdapter:
        """`sub` with a head that computes all tokens."""
        if not self.cuts_vocabulary(sub):
            return sub
        whole = {group.name: group.choices[0] for group in self if group is self.vocabulary}
        return SubAdapter(tuple((sub.as_dict() | whole).items()))

    def kept(self, sub: SubAdapter) -> dict[str, list[int]]:
        """By the name of every list of blocks of which some can be left out, places of those that
        `sub` runs."""
        found: dict[str, set[int]] = {}
        for group in self.depths:
            name = group.blocks[0].rpartition(".")[0]
            left = found.setdefault(name, set(range(group.listed or len(group.blocks))))
            left.difference_update(numbers(group.blocks[sub[group.name] :]))
        return {name: sorted(left) for name, left in found.items()}

    @cached_property
    def _inside(self) -> dict[str, list[str]]:
        """By block that may be left out, the groups that cut it alone."""
        found: dict[str, list[str]] = {block: [] for group in self.depths for block in group.blocks}
        lists = tuple({f"{block.rpartition('.')[0]}." for block in found})

        def block_of(site: str) -> str | None:
            start = next((name for name in lists if site.startswith(name)), None)
            return start and start + site.removeprefix(start).partition(".")[0]

        for group in self.groups if found else ():
            blocks = {block_of(cut.site) for cut in group.cuts}
            blocks |= {block_of(mixture.experts) for mixture in group.mixtures}
            if len(blocks) == 1 and (block := blocks.pop()) in found:
                found[block].append(group.name)
        return found

    def gone(self, indices: Mapping[str, int]) -> set[str]:
        """Names of groups whose block does not run at these indices into the choices of depths."""
        blocks = (
            block
            for group in self.depths
            for block in group.blocks[group.choices[indices[group.name]] :]
        )
        return {name for block in blocks for name in self._inside[block]}

    def left_out(self, sub: SubAdapter) -> tuple[str, ...]:
        """Names of the blocks that do not run, each with a point behind it, as the names of all
        that stands in it begin."""
        return tuple(
            f"{block}." for group in self.depths for block in group.blocks[sub[group.name] :]
        )

    def at(self, indices: Mapping[str, int]) -> Point:
        """The point with these indices into each group's descending choices. Groups of blocks that
        do not run have size 0."""
        raise NotImplementedError

    def indices(self, point: Point) -> dict[str, int]:
        """Inverse of `at`, 0 where the size is; RunError if it is no point of this space."""
        raise NotImplementedError

    def _sizes(self, indices: Mapping[str, int]) -> SubAdapter:
        gone = self.gone(indices)
        return SubAdapter(
            tuple((g.name, 0 if g.name in gone else g.choices[indices[g.name]]) for g in self)
        )

    def _indices(self, sub: SubAdapter) -> dict[str, int]:
        choices = self.check(sub).as_dict()
        return {
            group.name: group.choices.index(choices[group.name]) if choices[group.name] else 0
            for group in self.groups
        }

    def check(self, sub: SubAdapter) -> SubAdapter:
        """The sub-adapter in the order of this space, or a RunError that says what is foreign."""
        choices = sub.as_dict()
        strange = set(choices).symmetric_difference(group.name for group in self.groups)
        if strange:
            some = ", ".join(sorted(strange)[:3])
            raise RunError(f"sub-adapter and search space differ in {len(strange)} groups: {some}")
        gone: set[str] = set()
        if all(choices[group.name] in group.choices for group in self.depths):
            gone = self.gone({g.name: g.choices.index(choices[g.name]) for g in self.depths})
        for group in self.groups:
            if choices[group.name] not in group.choices and group.name not in gone:
                raise RunError(
                    f"sub-adapter: {group.name} is {choices[group.name]}; "
                    f"choose from {list(group.choices)}"
                )
        return SubAdapter(tuple((g.name, 0 if g.name in gone else choices[g.name]) for g in self))

    def maximal(self) -> Point:
        return self.at({group.name: 0 for group in self.groups})

    def minimal(self) -> Point:
        return self.at({group.name: len(group.choices) - 1 for group in self.groups})

    def heuristic(self) -> Point:
        """The choice at index (n - 1) // 2 of every group, the one LoNAS reports."""
        return self.at({group.name: (len(group.choices) - 1) // 2 for group in self.groups})

    def uniform(self, fraction: float) -> Point:
        """In every group the choice nearest to `fraction` of the full size."""

        def nearest(group: Group) -> int:
            goal = fraction * group.choices[0]
            return min(range(len(group.choices)), key=lambda i: abs(group.choices[i] - goal))

        return self.at({group.name: nearest(group) for group in self.groups})

    def random(self, generator: random_module.Random) -> Point:
        """Every group on its own, uniformly."""
        return self.at({g.name: generator.randrange(len(g.choices)) for g in self.groups})

    def stratified(self, generator: random_module.Random, jitter: float = 0.25) -> Point:
        """A target size first, then choices near it.

        Independent draws crowd around the middle and never visit the ends. Here a position t in
        [0, 1] is drawn once per dimension, and every group takes the choice nearest its
        dimension's t plus its own jitter. Dimensions have targets of their own because a small
        width with a full rank is what deployments ask for: a merged rank costs nothing.
        """
        targets = {dim: generator.random() for dim in sorted({group.dim for group in self})}

        def near(group: Group) -> int:
            last = len(group.choices) - 1
            t = targets[group.dim] + generator.uniform(-jitter, jitter)
            return round(last * min(1.0, max(0.0, t)))

        return self.at({group.name: near(group) for group in self.groups})

    def ladder(self) -> list[Point]:
        """Uniform points from the maximal to the minimal, without repeats."""
        steps = max((len(group.choices) for group in self.groups), default=1)
        rungs = [
            self.at({g.name: round(i * (len(g.choices) - 1) / max(1, steps - 1))
                     for g in self.groups})
            for i in range(steps)
        ]  # fmt: skip
        return list(dict.fromkeys(rungs))

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)


@dataclass(frozen=True)
class BoundSpace(Space[SubAdapter]):
    """A search space on one model."""

    def at(self, indices: Mapping[str, int]) -> SubAdapter:
        return self._sizes(indices)

    def indices(self, point: SubAdapter) -> dict[str, int]:
        return self._indices(point)

    def ordered(self, order: Mapping[str, Sequence[int] | Tensor]) -> BoundSpace:
        """The space whose depths leave out the last blocks of this order first; of other groups
        nothing is read."""
        groups = []
        for group in self.groups:
            if group.dim == DEPTH and group.name in order:
                by_place = dict(zip(places(group.blocks), group.blocks, strict=True))
                blocks = tuple(by_place[int(place)] for place in order[group.name])
                group = replace(group, blocks=blocks)
            groups.append(group)
        return replace(self, groups=tuple(groups))

    def named(self, name: str, seed: int = 0) -> SubAdapter:
        """maximal, heuristic, minimal, random or uniform-FRACTION; RunError for another name."""
        require_named(name)
        if name == "random":
            return self.random(random_module.Random(seed))
        if name in _NAMED:
            made: SubAdapter = getattr(self, name)()
            return made
        return self.uniform(float(name.removeprefix(_UNIFORM)))


_NAMED, _UNIFORM = ("maximal", "heuristic", "minimal"), "uniform-"


def require_named(name: str) -> None:
    """RunError unless every space has a sub-adapter of this name (`BoundSpace.named`)."""
    match = re.fullmatch(rf"{_UNIFORM}(\d*\.?\d+)", name)
    if name in (*_NAMED, "random") or (match and 0 < float(match[1]) <= 1):
        return
    raise RunError(unknown("sub-adapter", name, [*_NAMED, "random", "uniform-0.75"]))


def readable(count: int) -> str:
    """All digits below a million, else two and a power of ten, of a count that may be past every
    float: 625, 6.6e+477."""
    return f"{count:,}" if count < 10**6 else f"{Decimal(count):.1e}"


def all_digits(count: int) -> str:
    """Of a count that may have more than `str` writes."""
    return f"{Decimal(count):f}"


def generator_for(seed: int, *purpose: object) -> random_module.Random:
    """A generator of its own for each purpose. String seeds are hashed with SHA-512 by the
    standard library, alike on every platform."""
    return random_module.Random("/".join(map(str, (seed, *purpose))))
