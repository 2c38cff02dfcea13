"""Sub-adapters of one size for all layers, which a model family's own class can say.

Runtimes that know nothing of layers of different sizes (vLLM, llama.cpp's `llama`, every older
transformers) take those without code of ours. How near such a sub-adapter comes to the one that the
search chose is a question of its choices alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from elastic.spaces.bound import BoundSpace, Group, SubAdapter
from elastic.spaces.dims import DEPTH, VOCABULARY, Cut
from elastic.spaces.mixtures import EXPERT_WIDTH, EXPERTS, Mixture

Kind = tuple[str, int]
"""Dimension and full size: what one entry of a model's configuration says for all layers."""


def kinds(space: BoundSpace) -> dict[Kind, list[Group]]:
    """Groups of one size that a configuration says once: a T5's MLPs in encoder and decoder are of
    one kind. Ranks are of none, since merging leaves nothing of them, nor is depth, nor the
    vocabulary, which no family's own class cuts."""
    found: dict[Kind, list[Group]] = {}
    for group in space:
        if group.dim not in ("rank", DEPTH, VOCABULARY):
            found.setdefault((group.dim, group.choices[0]), []).append(group)
    return found


def with_sizes(space: BoundSpace, sub: SubAdapter, sizes: dict[Kind, int]) -> SubAdapter:
    """`sub` with these sizes in every layer that runs, and all tokens; its ranks and its depth
    stay."""
    chosen = space.with_whole_vocabulary(sub).as_dict()
    for kind, groups in kinds(space).items():
        for group in groups:
            if chosen[group.name]:
                chosen[group.name] = sizes[kind]
    return SubAdapter(tuple(chosen.items()))


def nearest_uniform(
    space: BoundSpace, sub: SubAdapter, fits: Callable[[SubAdapter], bool] | None = None
) -> SubAdapter:
    """The sub-adapter of one size per kind whose multiply-accumulates are nearest.

    Of every kind the choice is taken whose total over all layers that run is nearest to the total
    chosen, counting what its layers multiply per token: each cut row or column meets the residual
    stream, so that a size k costs k times the units of its cuts, and of an axis that is cut twice
    what the other group leaves of them. Of two as near the larger is taken. Where `fits` refuses (a
    family whose configuration cannot say such a size), the next nearest is tried: kinds in sum.
    """
    sub = space.check(sub)
    found = kinds(space)
    options = [_by_distance(space, groups, sub) for groups in found.values()]
    ranked = sorted(itertools.product(*options), key=lambda each: sum(gap for gap, _ in each))
    for each in ranked:
        sizes = {kind: size for kind, (_, size) in zip(found, each, strict=True)}
        uniform = with_sizes(space, sub, sizes)
        if fits is None or fits(uniform):
            return uniform
    return with_sizes(space, sub, {kind: kind[1] for kind in found})


def _by_distance(
    space: BoundSpace, groups: list[Group], sub: SubAdapter
) -> list[tuple[float, int]]:
    """(distance of totals, size), nearest first, of the sizes that all these groups may have."""
    running = [group for group in groups if sub[group.name]]
    units = {
        g.name: sum(_unit(space, g, cut, sub) for cut in g.cuts)
        + sum(_of_mixture(space, g, mixture, sub) for mixture in g.mixtures)
        for g in running
    }
    total = sum(sub[name] * unit for name, unit in units.items())
    common = set.intersection(*(set(group.choices) for group in groups))
    gaps = [(abs(size * sum(units.values()) - total), size) for size in common]
    return sorted(gaps, key=lambda each: (each[0], -each[1]))


def _unit(space: BoundSpace, group: Group, cut: Cut, sub: SubAdapter) -> int:
    """Channels that a size of 1 keeps of the axis, where other groups cut it as chosen."""
    unit = cut.unit
    for other, _ in space.axes[cut.site, cut.axis]:
        if other is not group:
            unit = unit * sub[other.name] // other.choices[0]
    return unit


def _of_mixture(space: BoundSpace, group: Group, mixture: Mixture, sub: SubAdapter) -> int:
    """Elements of the matrices of its experts that a size of 1 keeps, where the other group cuts
    them as chosen."""
    groups = space.mixtures[mixture.experts][1]
    chosen = {dim: sub[each.name] for dim, each in groups.items() if each is not group}
    size = mixture.elements(chosen.get(EXPERTS), chosen.get(EXPERT_WIDTH)).matrices
    return size // group.choices[0]


def covering(space: BoundSpace, sub: SubAdapter) -> Iterator[SubAdapter]:
    """Uniform sub-adapters that contain `sub`, smallest first: of every kind its largest size, then
    some kinds and at last all at their full size, which every configuration can say."""
    found = kinds(space)
    largest = {
        kind: max((sub[group.name] for group in groups), default=kind[1]) or kind[1]
        for kind, groups in found.items()
    }
    for count in range(len(found) + 1):
        for full in itertools.combinations(found, count):
            yield with_sizes(space, sub, largest | {kind: kind[1] for kind in full})
