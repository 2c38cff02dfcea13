"""The reference of settings: one fragment for every command, from its dataclass."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, is_dataclass
from typing import Any

from elastic.__main__ import COMMANDS
from elastic.config.parsing import SHORT

TYPES = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "unset"}
SPOKEN = {written: re.sub(r"\\", "", short) for short, written in SHORT.items()}
"""What the command line calls settings that cannot have these names."""


class Silent(Exception):
    """A setting that says nothing about itself."""


def pages() -> dict[str, str]:
    """File name to Markdown, for every command; Silent names what has no docstring."""
    return {
        f"{command.replace(' ', '-')}.md": page(command, kind)
        for command, (kind, *_) in COMMANDS.items()
    }


def page(command: str, kind: type) -> str:
    """A command's settings, those of the command itself first, then group after group."""
    start = f"elastic {command}"
    lines = [sentence(kind.__doc__), ""]
    for prefix, group, why in groups(kind):
        if prefix:
            lines += [f"## `{prefix}` {{ #{anchor(prefix)} }}", "", sentence(group.__doc__), ""]
            if why:
                lines += [sentence(why), ""]
        else:
            lines += [f"## Settings of `{start}` itself {{ #itself }}", ""]
        for one in dataclasses.fields(group):
            if not parts(hints(group)[one.name]):
                lines += setting(prefix, group, one)
    return "\n".join(lines)


def groups(kind: type, prefix: str = "", why: str = "") -> Iterator[tuple[str, type, str]]:
    """(dotted name, dataclass, what the group above says of it): this one, then those inside."""
    yield prefix, kind, why
    said = docstrings(kind)
    for one in dataclasses.fields(kind):
        for part in parts(hints(kind)[one.name]):
            name = f"{prefix}.{one.name}" if prefix else one.name
            yield from groups(part, name, said.get(one.name, ""))


def setting(prefix: str, kind: type, one: Field) -> list[str]:
    """One setting as an entry of a definition list."""
    name = f"{prefix}.{one.name}" if prefix else one.name
    if one.name not in (said := docstrings(kind)):
        raise Silent(f"{kind.__module__}.{kind.__name__}.{one.name} has no docstring under it")
    spoken = SPOKEN.get(name, name)
    default = f", default {shown(one)}" if shown(one) else ""
    return [
        f"`--{spoken}`{{ #{anchor(name)} }}",
        f":   *{type_of(hints(kind)[one.name])}{default}*  ",
        f"    {sentence(said[one.name])}",
        "",
    ]


@functools.cache
def docstrings(kind: type) -> dict[str, str]:
    """The text under every field of a dataclass that has some."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: text.value.value
        for field, text in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }  # fmt: skip


def sentence(text: str | None) -> str:
    """A docstring on one line, with what Markdown would take for markup as it is."""
    words = " ".join((text or "").split())
    inside = re.split(r"(`[^`]*`)", words)
    return "".join(w if w.startswith("`") else re.sub(r"([*_<|])", r"\\\1", w) for w in inside)


def type_of(hint: Any) -> str:
    """A type in words: choices as they are written, None as unset."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin is list:
        return f"list of {type_of(inner[0])}"
    if inner:
        return " or ".join(type_of(one) for one in inner)
    return TYPES[hint]


def shown(one: Field) -> str:
    """A default as a recipe would have it; nothing where a value must be given."""
    value = one.default if one.default_factory is MISSING else one.default_factory()
    if value is MISSING:
        return ""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return f"`{','.join(map(str, value))}`" if value else "none"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def anchor(name: str) -> str:
    """What a link to a setting ends with."""
    return name.replace(".", "-")


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """Types of the fields, aliases resolved."""
    return typing.get_type_hints(kind)


def parts(hint: Any) -> list[type]:
    """The dataclasses that a setting of this type is, or is a list of."""
    return [part for part in (hint, *typing.get_args(hint)) if is_dataclass(part)]
