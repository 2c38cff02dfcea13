"""The reference of names: the public ones of `elastic`, the commands, the tree of errors."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import elastic
from elastic import errors
from elastic.__main__ import COMMANDS
from fragments.settings import Silent, anchor, groups, sentence

Definition = ast.ClassDef | ast.FunctionDef
OURS = {"dev", "docs"}
"""Extras for those who work on the package."""


def pages() -> dict[str, str]:
    """File name to Markdown; Silent names what has no docstring."""
    return {
        "python.md": python(),
        "commands.md": commands(),
        "errors.md": tree(),
        "extras.md": extras(),
    }


def python() -> str:
    """A table of the dataclasses of settings, then what mkdocstrings explains: every other public
    name, where it is defined."""
    rows, places = ["| settings | of |", "| --- | --- |"], []
    for name in elastic.__all__:
        where, node = defined(f"elastic.{elastic._WHERE[name]}", name)
        if silent := [f"{where}.{one}" for one in without_docstring(node)]:
            raise Silent(f"{', '.join(silent)}: no docstring")
        if links := pages_of(name):
            rows.append(f"| `elastic.{name}` | {', '.join(links)} |")
        else:
            options = f"    options: {{heading: elastic.{name}, toc_label: {name}}}"
            places.append(f"::: {where}.{name}\n{options}")
    return "\n".join(rows) + "\n\n" + "\n\n".join(places) + "\n"


def pages_of(name: str) -> list[str]:
    """Links to where the settings of this dataclass are explained; none of anything else."""
    links = []
    for command, (kind, *_) in COMMANDS.items():
        page = f"settings/{command.replace(' ', '-')}.md"
        for prefix, group, _why in groups(kind):
            if group.__name__ == name:
                shown = f"{command}: `{prefix}`" if prefix else command
                links.append(f"[{shown}]({page}#{anchor(prefix) or 'itself'})")
    return links


def defined(module: str, name: str) -> tuple[str, Definition]:
    """The module that defines a class or function, and its definition; nothing is imported but the
    packages around it. Silent where it is neither."""
    spec = find_spec(module)
    assert spec and spec.origin, module
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, Definition) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            names = {alias.asname or alias.name: alias.name for alias in node.names}
            if name in names:
                return defined(str(node.module), names[name])
    raise Silent(f"{module}.{name} is no class and no function; say in fragments what it is")


def without_docstring(node: Definition) -> Iterator[str]:
    """Names of it, or of public methods of it, that say nothing about themselves."""
    if not ast.get_docstring(node):
        yield node.name
    inside = [one for one in node.body if isinstance(one, ast.FunctionDef)]
    for one in inside if isinstance(node, ast.ClassDef) else ():
        if not one.name.startswith("_") and not ast.get_docstring(one):
            yield f"{node.name}.{one.name}"


def commands() -> str:
    """A table of the commands, each with a link to its settings."""
    rows = ["| command | what it does |", "| --- | --- |"]
    for name, (kind, *_) in COMMANDS.items():
        page = f"settings/{name.replace(' ', '-')}.md"
        rows.append(f"| [`elastic {name}`]({page}) | {sentence(kind.__doc__)} |")
    return "\n".join(rows) + "\n"


def extras() -> str:
    """What can be installed beside the base, and which packages that brings."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = ["| extra | brings |", "| --- | --- |"]
    for name, packages in sorted(project["optional-dependencies"].items()):
        if name not in OURS:
            rows.append(f"| `{name}` | {', '.join(f'`{one}`' for one in packages)} |")
    return "\n".join(rows) + "\n"


def tree() -> str:
    """The errors as `elastic.errors` draws them, then each with its meaning."""
    drawn = re.search(r"( {4}ElasticError\n(?: {4}.*\n)+)", errors.__doc__ or "")
    assert drawn, "elastic.errors draws its tree"
    lines = ["```text", *inspect.cleandoc("\n" + drawn[1]).splitlines(), "```", ""]
    for name in re.findall(r"\w+", drawn[1]):
        lines += [f"`{name}`{{ #{name} }}", f":   {sentence(getattr(errors, name).__doc__)}", ""]
    return "\n".join(lines)
