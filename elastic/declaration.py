"""What a search space says of one kind of block, as YAML declares it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from elastic.dims import DEPTH, DIMS, GroupSpec
from elastic.errors import ConfigError, unknown


@dataclass(frozen=True)
class Section:
    """What is elastic in one kind of block, such as a decoder layer."""

    blocks: str
    adapt: tuple[str, ...]
    groups: tuple[GroupSpec, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "blocks": self.blocks,
            "adapt": list(self.adapt),
            "groups": {
                spec.name: {
                    key: list(item) if isinstance(item, tuple) else item
                    for key, item in _declared(spec).items()
                    if key != "name"
                }
                for spec in self.groups
            },
        }


def section_of(value: Any, source: str) -> Section:
    """From what YAML says of it; ConfigError names the group that is wrong."""
    _keys(value, {"blocks", "adapt", "groups"}, {"blocks", "groups"}, source)
    _types(value, source)
    groups = []
    for name, spec in value["groups"].items():
        where = f"{source}: group {name!r}"
        if not isinstance(spec, Mapping) or spec.get("dim") not in [*DIMS, DEPTH]:
            dim = spec.get("dim") if isinstance(spec, Mapping) else None
            raise ConfigError(f"{where}: {unknown('dim', str(dim), [*DIMS, DEPTH])}")
        lists, more = {"outputs", "inputs"}, {"align", "share", "fused"}
        if spec["dim"] == "rank":
            lists, more = {"of"}, {"align", "share"}
        elif spec["dim"] == DEPTH:
            lists, more = set(), {"drop_ends"}
        _keys(spec, {"dim", "choices"} | more | lists, {"dim", "choices"} | lists, where)
        groups.append(_group_spec(name, spec, where))
    return Section(value["blocks"], tuple(value.get("adapt", ())), tuple(groups))


def _keys(value: Any, allowed: set[str], needed: set[str], where: str) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a mapping with {sorted(needed)}, got {value!r}")
    for key in value:
        if key not in allowed:
            raise ConfigError(f"{where}: {unknown('key', str(key), allowed)}")
    if missing := needed - set(value):
        raise ConfigError(f"{where}: missing {sorted(missing)}")


def _types(value: Mapping[str, Any], where: str) -> None:
    if not isinstance(value["blocks"], str):
        raise ConfigError(f"{where}: blocks is {value['blocks']!r}; give a pattern of module names")
    if not isinstance(adapt := value.get("adapt", []), list):
        raise ConfigError(f"{where}: adapt is {adapt!r}; give a list of layer names")
    _once(adapt, f"{where}: adapt")
    if not isinstance(value["groups"], Mapping):
        raise ConfigError(f"{where}: groups is {value['groups']!r}; give a mapping by name")


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
    align = spec.get("align", 1)
    if type(align) is not int or align < 1:
        raise ConfigError(f"{where}: align is {align!r}; give an integer from 1 up")
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
    return GroupSpec(
        name, spec["dim"], tuple(choices), align=align, fused=fused, share=share, drop_ends=ends,
        **lists,
    )  # fmt: skip


def _once(names: Sequence[Any], where: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where}: {twice!r} stands there twice; name it once")


def _declared(spec: GroupSpec) -> dict[str, Any]:
    """What departs from the defaults."""
    values = ((field, getattr(spec, field.name)) for field in fields(spec))
    return {field.name: value for field, value in values if value != field.default}
