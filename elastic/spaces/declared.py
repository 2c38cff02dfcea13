"""A search space as YAML declares it, and how it is bound to a model: patterns become groups of
sites with absolute choices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from elastic.errors import ConfigError, unknown
from elastic.files import shipped
from elastic.plain import read_yaml
from elastic.spaces.blocks import blocks_of, require_described
from elastic.spaces.bound import BoundSpace, Group
from elastic.spaces.dims import DEPTH, DIMS, VOCABULARY, GroupSpec
from elastic.spaces.expert_dims import EXPERT_DIMS
from elastic.spaces.mixtures import ALIGN, EXPERT_WIDTH, Mixture
from elastic.spaces.pattern import matching
from elastic.spaces.targets import linears_of, matrices_of, require_known
from elastic.spaces.vocabulary import vocabulary


@dataclass(frozen=True)
class Section:
    """What is elastic in one kind of block, such as a decoder layer."""

    blocks: str
    """A pattern of their names (`elastic.spaces.pattern`)."""
    adapt: tuple[str, ...]
    groups: tuple[GroupSpec, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "blocks": self.blocks,
            "adapt": list(self.adapt),
            "groups": {spec.name: _declared(spec) for spec in self.groups},
        }


def section_of(value: Any, source: str) -> Section:
    """From what YAML says of it; ConfigError names the group that is wrong."""
    _keys(value, {"blocks", "adapt", "groups"}, {"blocks", "groups"}, source)
    if not isinstance(value["blocks"], str):
        raise ConfigError(
            f"{source}: blocks is {value['blocks']!r}; give a pattern of module names"
        )
    matching(value["blocks"], source)
    if not isinstance(adapt := value.get("adapt", []), list):
        raise ConfigError(f"{source}: adapt is {adapt!r}; give a list of layer names")
    _once(adapt, f"{source}: adapt")
    if not isinstance(value["groups"], Mapping):
        raise ConfigError(f"{source}: groups is {value['groups']!r}; give a mapping by name")
    groups = []
    for name, spec in value["groups"].items():
        where = f"{source}: group {name!r}"
        dim = spec.get("dim") if isinstance(spec, Mapping) else None
        known = [*DIMS, *EXPERT_DIMS, DEPTH, VOCABULARY]
        if dim not in known:
            raise ConfigError(f"{where}: {unknown('dim', str(dim), known)}")
        lists, more = {"outputs", "inputs"}, {"align", "share", "fused"}
        if dim == "rank" or dim in EXPERT_DIMS:
            lists, more = {"of"}, {"align", "share"}
        elif dim == DEPTH:
            lists, more = set(), {"drop_ends"}
        elif dim == VOCABULARY:
            lists, more = set(), {"align", "least"}
        _keys(spec, {"dim", "choices"} | more | lists, {"dim", "choices"} | lists, where)
        groups.append(_group_spec(name, spec, where))
    return Section(value["blocks"], tuple(adapt), tuple(groups))


def _keys(value: Any, allowed: set[str], needed: set[str], where: str) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a mapping with {sorted(needed)}, got {value!r}")
    for key in value:
        if key not in allowed:
            raise ConfigError(f"{where}: {unknown('key', str(key), allowed)}")
    if missing := needed - set(value):
        raise ConfigError(f"{where}: missing {sorted(missing)}")


def _group_spec(name: str, spec: Mapping[str, Any], where: str) -> GroupSpec:
    choices = spec["choices"]
    if not isinstance(choices, list) or not choices:
        raise ConfigError(f"{where}: choices is {choices!r}; give a list of sizes or fractions")
    for choice in choices:
        fraction = isinstance(choice, float) and 0 < choice <= 1
        size = type(choice) is int and choice >= 1
        if not (fraction or size):
            raise ConfigError(
                f"{where}: choice {choice!r}; give sizes from 1 up, or fractions in (0.0, 1.0]"
            )
    least_align = ALIGN if spec["dim"] == EXPERT_WIDTH else 1
    align = spec.get("align", least_align)
    if type(align) is not int or align < 1:
        raise ConfigError(f"{where}: align is {align!r}; give an integer from 1 up")
    if align % least_align:
        raise ConfigError(
            f"{where}: align is {align}; the kernels of experts take rows of 16 bytes, so give a "
            f"multiple of {ALIGN}"
        )
    lists = {}
    for key in ("of", "outputs", "inputs"):
        items = spec.get(key, [])
        if key in spec and (not isinstance(items, list) or not items):
            raise ConfigError(f"{where}: {key} is {items!r}; give a list of layer names")
        _once(items, f"{where}: {key}")
        lists[key] = tuple(items)
    fused = spec.get("fused")
    known = ("parts",) if spec["dim"] == "width" else ("parts", "heads")
    if fused not in (None, *known):
        raise ConfigError(f"{where}: {unknown('fused', str(fused), known)}")
    share, shares = spec.get("share", "block"), ["block", "model"]
    if spec["dim"] == "rank":
        shares.append("layer")
    if share not in shares:
        raise ConfigError(f"{where}: {unknown('share', str(share), shares)}")
    ends = spec.get("drop_ends", False)
    if not isinstance(ends, bool):
        raise ConfigError(f"{where}: drop_ends is {ends!r}; give true or false")
    least = spec.get("least", 1)
    if type(least) is not int or least < 1:
        raise ConfigError(f"{where}: least is {least!r}; give an integer from 1 up")
    return GroupSpec(
        name, spec["dim"], tuple(choices), align=align, fused=fused, share=share, drop_ends=ends,
        least=least, **lists,
    )  # fmt: skip


def _within(spec: GroupSpec, max_rank: int) -> GroupSpec:
    """Without ranks past this one."""
    if spec.dim != "rank":
        return spec
    fits = tuple(c for c in spec.choices if isinstance(c, float) or c <= max_rank)
    return replace(spec, choices=fits or (1.0,))


def _once(names: Sequence[Any], where: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where}: {twice!r} stands there twice; name it once")


def _declared(spec: GroupSpec) -> dict[str, Any]:
    """What departs from the defaults, beside the name."""
    values = ((f, getattr(spec, f.name)) for f in fields(spec) if f.name != "name")
    return {f.name: list(v) if isinstance(v, tuple) else v for f, v in values if v != f.default}


@dataclass(frozen=True)
class SearchSpace:
    """What is elastic in a family of models; knows no model."""

    sections: tuple[Section, ...]
    source: str = "search space"

    @classmethod
    def load(cls, name: str) -> SearchSpace:
        """The shipped space of that name, or the one in a YAML file; ConfigError if it is none."""
        path = shipped("search_spaces", name)
        return cls.from_dict(read_yaml(path), source=path.name)

    @classmethod
    def from_dict(cls, value: Any, source: str = "search space") -> SearchSpace:
        """From one section, or a list of them; ConfigError names the group that is wrong."""
        values = value if isinstance(value, list) and value else [value]
        sections = tuple(section_of(item, source) for item in values)
        if not any(section.adapt for section in sections):
            raise ConfigError(f"{source}: no layer carries factors; name some in adapt")
        return cls(sections, source)

    def adapting(self, sites: Sequence[str], max_rank: int) -> SearchSpace:
        """For factors of these layers and this rank that are there already: the layers are among
        the adapted ones of their blocks, and no rank is larger. ConfigError for a layer outside."""
        more: dict[Section, dict[str, None]] = {section: {} for section in self.sections}
        for site in sites:
            for section in self.sections:
                blocks = matching(section.blocks, self.source)
                if match := re.match(rf"{blocks.pattern}\.(.+)", site):
                    more[section][match[1]] = None
                    break
            else:
                raise ConfigError(
                    f"{self.source}: {site} lies in no block of this space, so its update cannot "
                    "be part of a sub-adapter"
                )
        sections = (
            replace(
                section,
                adapt=tuple(dict.fromkeys((*section.adapt, *more[section]))),
                groups=tuple(_within(spec, max_rank) for spec in section.groups),
            )
            for section in self.sections
        )
        return SearchSpace(tuple(sections), self.source)

    @property
    def has_ranks_alone(self) -> bool:
        """Whether nothing else is elastic."""
        return all(spec.dim == "rank" for section in self.sections for spec in section.groups)

    def with_whole_ranks(self) -> SearchSpace:
        """The same layers adapted and no rank to choose from; unchanged where there is nothing
        else."""
        if self.has_ranks_alone:
            return self
        sections = (
            replace(section, groups=tuple(spec for spec in section.groups if spec.dim != "rank"))
            for section in self.sections
        )
        return SearchSpace(tuple(sections), self.source)

    @property
    def cuts_vocabulary(self) -> bool:
        """Whether the head may compute some tokens alone."""
        return any(s.dim == VOCABULARY for section in self.sections for s in section.groups)

    @property
    def least(self) -> int:
        """How many tokens stay in its vocabulary, whatever is chosen."""
        specs = (spec for section in self.sections for spec in section.groups)
        return max((spec.least for spec in specs if spec.dim == VOCABULARY), default=1)

    def with_least(self, tokens: int) -> SearchSpace:
        """The same where so many tokens stay in any vocabulary."""
        sections = (
            replace(
                section,
                groups=tuple(
                    replace(spec, least=tokens) if spec.dim == VOCABULARY else spec
                    for spec in section.groups
                ),
            )
            for section in self.sections
        )
        return SearchSpace(tuple(sections), self.source)

    def as_dict(self) -> dict[str, Any] | list[dict[str, Any]]:
        """The declaration again; `from_dict` reads it back to an equal space."""
        declared = [section.as_dict() for section in self.sections]
        return declared[0] if len(declared) == 1 else declared

    def bind(self, model: nn.Module, max_rank: int) -> BoundSpace:
        """Groups with sites and absolute choices for this model (meta tensors will do).

        ConfigError when a pattern matches nothing or a choice does not fit.
        """
        bound = [self._bind(section, model, max_rank) for section in self.sections]
        groups = [group for found, *_ in bound for group in found]
        if sum(group.dim == VOCABULARY for group in groups) > 1:
            raise ConfigError(f"{self.source}: two groups cut the vocabulary; declare it once")
        taken: dict[tuple[str, str, bool], str] = {}
        for group in groups:
            places: list[tuple[str, str, bool]] = [
                *((cut.site, cut.axis, cut.apart) for cut in group.cuts),
                *((mixture.experts, group.dim, False) for mixture in group.mixtures),
            ]
            for place in (*places, *((block, DEPTH, False) for block in group.blocks)):
                other = taken.setdefault(place, group.name)
                if other != group.name:
                    raise ConfigError(
                        f"{self.source}: {place[0]} ({place[1]}) is cut by both "
                        f"{other!r} and {group.name!r}; give it one group"
                    )
        targets = dict.fromkeys(target for _, found, _ in bound for target in found)
        adapted = {mixture.experts: mixture for *_, found in bound for mixture in found}
        return BoundSpace(tuple(groups), tuple(targets), tuple(adapted.values()))

    def _bind(
        self, section: Section, model: nn.Module, max_rank: int
    ) -> tuple[list[Group], list[str], list[Mixture]]:
        """Groups, what carries factors, and the mixtures whose matrices do."""
        linears = linears_of(model)
        names = [name for name, _ in model.named_modules()]
        pattern = matching(section.blocks, self.source)
        blocks = [name for name in names if pattern.fullmatch(name)]
        if not blocks:
            raise ConfigError(
                f"{self.source}: blocks {section.blocks!r} matches nothing in "
                f"{type(model).__name__}; its modules are {_outline(names)}"
            )
        targets = [f"{block}.{name}" for block in blocks for name in section.adapt]
        matrices = {} if linears.issuperset(targets) else matrices_of(model)
        carriers = "linear layer or matrix of all experts" if matrices else "linear layer"
        require_known(targets, linears | set(matrices), f"{self.source}: adapt", carriers)
        groups: dict[str, Group] = {}
        specs = [part for whole in section.groups for part in whole.parted()]
        for spec in specs:
            where = f"{self.source}: group {spec.name!r}"
            if spec.dim == DEPTH:
                depth = _depth(model, section, blocks, spec, where)
                groups[depth.name] = depth
            if spec.dim == VOCABULARY:
                whole = vocabulary(model, spec, where)
                groups[whole.name] = whole
        for block in blocks:
            for spec in (spec for spec in specs if spec.dim not in (DEPTH, VOCABULARY)):
                where = f"{self.source}: group {spec.name!r}"
                sites = [f"{block}.{name}" for name in (*spec.of, *spec.outputs, *spec.inputs)]
                if spec.dim == "rank":
                    require_known(sites, linears | set(matrices), where, carriers)
                    require_known(sites, set(targets), where, "adapted layer (see `adapt`)")
                elif spec.dim not in EXPERT_DIMS:
                    require_known(sites, linears, where)
                found = {**DIMS, **EXPERT_DIMS}[spec.dim](model, block, spec, max_rank)
                _no_router(targets, found.mixtures, where)
                name = f"{section.blocks if spec.share == 'model' else block}.{spec.name}"
                choices = spec.resolve(found.full, where, -(-found.least // spec.align))
                if choices[-1] < found.least:
                    raise ConfigError(
                        f"{where}: {spec.dim} {choices[-1]}, but every token is sent to some of "
                        f"at least {found.least}; choose from {found.least}..{found.full}"
                    )
                own = Group(
                    name,
                    spec.dim,
                    choices,
                    found.cuts,
                    found.counted,
                    mixtures=found.mixtures,
                )
                groups[name] = own.joined(groups[name], where) if name in groups else own
        return list(groups.values()), targets, [matrices[t] for t in targets if t in matrices]


def _no_router(targets: Sequence[str], mixtures: Sequence[Mixture], where: str) -> None:
    """ConfigError for factors in what chooses experts: it is cut with them."""
    for mixture in mixtures:
        for target in targets:
            if mixture.router and f"{target}.".startswith(f"{mixture.router}."):
                raise ConfigError(
                    f"{where}: {target} chooses among the experts of {mixture.experts} and is cut "
                    "with them; leave it out of adapt"
                )


def _depth(
    model: nn.Module, section: Section, blocks: Sequence[str], spec: GroupSpec, where: str
) -> Group:
    """The one group of how many of the section's blocks run; the first and the last block of the
    model stay."""
    shared = [s.name for s in section.groups if s.share == "model" and s.dim != "rank"]
    if shared:
        raise ConfigError(
            f"{where}: group {shared[0]!r} has one choice for the whole model, of which only the "
            "blocks that run would be cut; let every block choose its own"
        )
    parent = blocks[0].rpartition(".")[0]
    listed = blocks_of(model, blocks, where)
    outer = () if spec.drop_ends else (f"{parent}.0", f"{parent}.{listed - 1}")
    ends = tuple(block for block in blocks if block in outer)
    choices = spec.resolve(len(blocks), where, max(1, len(ends)))
    if choices[-1] < len(ends):
        raise ConfigError(
            f"{where}: depth {choices[-1]}, but the first and the last block stay; choose from "
            f"{len(ends)}..{len(blocks)}, or set drop_ends"
        )
    between = tuple(block for block in blocks if block not in ends)
    require_described(model, between, len(blocks) - choices[-1], where)
    name = f"{section.blocks}.{spec.name}"
    return Group(
        name, DEPTH, choices, (), blocks=(*ends, *between), staying=len(ends), listed=listed
    )


def _outline(names: list[str]) -> str:
    """The distinct shapes of module names, numbers as *, three levels deep."""
    shapes = dict.fromkeys(re.sub(r"\.\d+", ".*", name) for name in names if name)
    shallow = [shape for shape in shapes if shape.count(".") <= 2]
    return ", ".join(shallow[:8])


def describe(space: SearchSpace) -> list[str]:
    """What a space cuts, a line for each kind of block."""
    lines = []
    for section in space.sections:
        layers = {g.name: g.of or (*g.outputs, "->", *g.inputs) for g in section.groups}
        groups = "".join(f", {name} ({' '.join(what)})" for name, what in layers.items())
        lines.append(f"{section.blocks}: {len(section.adapt)} adapted layers{groups}")
    return lines
