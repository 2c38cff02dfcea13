"""Plain data out of text that a stranger may have written: mappings, lists and scalars. Nothing is
looked up as code, whatever a text holds, and reading it takes time in proportion to its length."""

from __future__ import annotations

import json
import math
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from elastic.errors import ConfigError, ElasticError, RunError

DEEPEST = 64
"""How many mappings and lists may stand in one another."""
MOST_REPEATED = 10_000
"""How many values aliases may stand for, all together."""
Refusal = type[ElasticError]
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAGGED = (yaml.ScalarEvent, yaml.CollectionStartEvent)
_UNREADABLE = (yaml.YAMLError, ValueError, OverflowError, RecursionError)
"""What parsers raise, of which ValueError is for numbers of thousands of digits and no dates."""


def read_text(path: Path | str, refusal: Refusal = RunError) -> str:
    """The UTF-8 text in a file; `refusal` names the file when it is absent or something else."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise refusal(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise refusal(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, ValueError) as error:  # a path with a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise refusal(f"{path}: cannot be read: {str(reason).lower()}") from None


def read_yaml(path: Path | str, refusal: Refusal = ConfigError) -> Any:
    """The YAML in a file; `refusal` names file and line of what is no plain data."""
    return parse_yaml(read_text(path, refusal), path, refusal)


def parse_yaml(text: str, where: Path | str, refusal: Refusal = ConfigError) -> Any:
    """The same of a text that came from `where`."""
    try:
        check_yaml(text)
        return yaml.load(text, _LOADER)
    except _UNREADABLE as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        language = "JSON" if str(where).endswith(".json") else "YAML"
        raise refusal(f"{place}: broken {language}: {one_line(error)}") from None


def parse_json(text: str, where: Path | str, refusal: Refusal = RunError) -> Any:
    """The JSON in a text that came from `where`; `refusal` names file and line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise refusal(f"{where}:{error.lineno}: broken JSON: {error.msg}") from None
    except RecursionError:
        raise refusal(f"{where}: broken JSON: nested too deep") from None
    except ValueError as error:  # of a number of thousands of digits
        raise refusal(f"{where}: broken JSON: {one_line(error)}") from None


@dataclass
class _Open:
    """A mapping or list whose end has not been read."""

    anchor: str | None
    keys: set[str] | None
    """Of a mapping, as far as it was read."""
    at_key: bool = True
    nodes: int = 1
    height: int = 1


def check_yaml(text: str) -> None:
    """YAMLError for what plain data can do without and harm is done with: tags (they name types to
    construct), aliases that contain themselves or stand for very much (500 bytes of them may stand
    for gigabytes), nesting, a key given twice (one of them would be dropped), keys that are no
    scalars."""
    sizes: dict[str, tuple[int, int]] = {}  # nodes and height of what has an anchor
    open_: list[_Open] = []
    repeated = 0

    for event in yaml.parse(text, _LOADER):
        problem, anchor, nodes, height = None, getattr(event, "anchor", None), 1, 0
        if isinstance(event, yaml.CollectionEndEvent):
            done = open_.pop()
            anchor, nodes, height = done.anchor, done.nodes, done.height
        elif not isinstance(event, yaml.NodeEvent):
            continue
        elif isinstance(event, yaml.AliasEvent):
            nodes, height = sizes.get(event.anchor or "", (0, 0))
            repeated += nodes
            if not nodes or repeated > MOST_REPEATED:
                problem = f"the alias *{event.anchor} cannot be followed; write what it stands for"
        elif isinstance(event, _TAGGED) and event.tag is not None:
            problem = f"a tag ({event.tag}); leave it out"
        if open_ and not isinstance(event, yaml.CollectionEndEvent):
            problem = problem or _key_problem(open_[-1], event)
        if isinstance(event, yaml.CollectionStartEvent):
            keys: set[str] | None = set() if isinstance(event, yaml.MappingStartEvent) else None
            open_.append(_Open(anchor, keys))
        else:
            if anchor and not isinstance(event, yaml.AliasEvent):
                sizes[anchor] = nodes, height
            if open_:
                open_[-1].nodes += nodes
                open_[-1].height = max(open_[-1].height, height + 1)
        if len(open_) + height > DEEPEST:
            problem = f"more than {DEEPEST} lists and mappings in one another"
        if problem:
            mark: Any = event.start_mark  # of the C parser
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _key_problem(parent: _Open, event: yaml.NodeEvent) -> str | None:
    """What is wrong with a key of a mapping, if this event is one."""
    if parent.keys is None:
        return None
    is_key, parent.at_key = parent.at_key, not parent.at_key
    if not is_key:
        return None
    if not isinstance(event, yaml.ScalarEvent):
        return "a key that is no name"
    if event.value in parent.keys:
        return f"{event.value!r} stands there twice; give it once"
    parent.keys.add(event.value)
    return None


def shaped(value: Any, shape: Any, where: Path | str) -> Any:
    """`value`, if it has this shape; else RunError, which says where it has another.

    A shape is a type (float takes any finite number), a mapping of at least these names to shapes,
    a list of one shape for all, or a list of as many values as shapes.
    """
    if isinstance(shape, dict):
        shaped(value, dict, where)
        for name, inner in shape.items():
            if name not in value:
                raise RunError(f"{where}: {name} is missing; the file is damaged, or another")
            shaped(value[name], inner, f"{where}: {name}")
    elif isinstance(shape, list):
        shaped(value, list, where)
        shapes = shape * len(value) if len(shape) == 1 else shape
        if len(shapes) != len(value):
            raise RunError(f"{where}: {len(value)} values instead of {len(shapes)}")
        for one, inner in zip(value, shapes, strict=True):
            shaped(one, inner, where)
    elif not _is(value, shape):
        raise RunError(f"{where}: expected {_CALLED[shape]}, got {reprlib.repr(value)}")
    return value


_CALLED = {
    dict: "a mapping", list: "a list", str: "text", bool: "true or false", int: "a whole number",
    float: "a finite number",
}  # fmt: skip


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float) and abs(value) < math.inf
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def is_name(text: str) -> bool:
    """Whether this can be the name of a file in a folder, and nothing else: it has no slash and no
    control characters, and does not begin with a dot."""
    return re.fullmatch(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,199}", text) is not None


def one_line(error: BaseException) -> str:
    """What an error of another library says, short and on one line."""
    text = getattr(error, "problem", None) or str(error) or type(error).__name__
    flat = " ".join(str(text).split())
    return flat if len(flat) <= 300 else f"{flat[:300]} ..."
