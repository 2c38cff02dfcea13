"""Command line and YAML to configuration; the only room that knows the CLI library."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from elastic.errors import ConfigError, unknown
from elastic.files import shipped

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


SHORT = {r"adapter\.from": "adapter.taken_from", "recover": "recover.steps"}
"""What the command line calls settings that cannot have these names."""

# A setting is explained by the docstring under its field.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(
    kind: type[Config], arguments: Sequence[str] | None = None, prog: str | None = None
) -> Config:
    """A configuration from the command line: YAML by --config, dotted flags over it.

    A first argument without dashes is the first setting, mostly the run directory. ConfigError on
    anything unknown.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments[:1] = [f"--{dataclasses.fields(kind)[0].name}", arguments[0]]
    for short, name in SHORT.items():
        arguments = [re.sub(rf"^--{short}(?==|$)", f"--{name}", a) for a in arguments]
    parser = _parser(kind, prog)
    arguments = _with_values(kind, _with_recipes(_continuing(kind, arguments)))
    return _build(kind, parser, lambda: parser.parse_args(arguments))


def from_dict(kind: type[Config], value: Mapping[str, Any], where: str) -> Config:
    """A configuration from what a YAML file held; ConfigError names the file."""
    parser = _parser(kind)
    try:
        return _build(kind, parser, lambda: parser.parse_object(dict(value)))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


@functools.cache
def _parser(kind: type, prog: str | None = None) -> ArgumentParser:
    """Made once: reading the docstring of every setting takes half a second."""
    description = " ".join((kind.__doc__ or "").split())
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file, or the name of a recipe.")
    parser.add_class_arguments(kind)
    return parser


def _build(kind: type[Config], parser: ArgumentParser, read: Callable[[], Namespace]) -> Config:
    try:
        values = vars(parser.instantiate(read()))
    except ConfigError:
        raise
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(_reason(kind, str(error))) from None
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})


def _continuing(kind: type, arguments: list[str]) -> list[str]:
    """`--from RUN` is that run's settings, `--start_from RUN`, and a directory beside it."""
    given = {}
    for argument, following in itertools.pairwise([*arguments, ""]):
        name, equals, value = argument.partition("=")
        given[name] = value if equals else following
    run = given.get("--from")
    if not run or "start_from" not in _dotted(kind):
        return arguments
    at = next(i for i, argument in enumerate(arguments) if argument.partition("=")[0] == "--from")
    others = arguments[:at] + arguments[at + (1 if "=" in arguments[at] else 2) :]
    what = Path(given.get("--sub_adapter", "next")).stem
    beside = [] if "--run" in given else ["--run", f"{run.rstrip('/')}-{what}"]
    trained = ["--config", str(Path(run) / "config.yaml"), "--adapter.taken_from", "null"]
    return [*trained, "--start_from", run, *beside, *others]


def _with_recipes(arguments: list[str]) -> list[str]:
    """`--config NAME` means the shipped recipe of that name. Recipes come first, wherever they
    were given, so that every flag and the run directory override them."""
    recipes: list[str] = []
    others: list[str] = []
    for argument in arguments:
        if recipes and recipes[-1] == "--config":
            recipes.append(str(shipped("configs", argument)))
        elif argument == "--config":
            recipes.append(argument)
        elif argument.startswith("--config="):
            recipes += ["--config", str(shipped("configs", argument.removeprefix("--config=")))]
        else:
            others.append(argument)
    return recipes + others


def _with_values(kind: type, arguments: list[str]) -> list[str]:
    """A switch alone is on: `--dry_run` means `--dry_run true`. Names with commas are a list:
    `--formats hf,onnx` means `--formats [hf,onnx]`."""
    switches = {f"--{name}" for name in _dotted(kind, of=bool)}
    lists = {f"--{name}" for name in _dotted(kind, of=list)}
    spelled: list[str] = []
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        name, equals, value = argument.partition("=")
        if name in lists and equals:
            argument = f"{name}={_bracketed(value)}"
        elif spelled and spelled[-1] in lists:
            argument = _bracketed(argument)
        spelled.append(argument)
        if argument in switches and following.startswith("--"):
            spelled.append("true")
    return spelled


def _bracketed(value: str) -> str:
    """Names with commas between them as a list; what is spelled as YAML or JSON as it is."""
    return f"[{value}]" if re.fullmatch(r"[\w.-]+(,[\w.-]+)*", value) else value


def _reason(kind: type, message: str) -> str:
    """The library's message on one line, with the nearest name where one was unknown."""
    message = " ".join(message.split())
    for pattern in (
        r"unrecognized arguments: -*(?P<name>[\w.]+)",
        r"^Option '(?P<name>[\w.]+)' is not accepted",
        r"^Parser key \"(?P<group>[\w.]+)\": .* class_path .* Option '(?P<name>[\w.]+)' is not",
        r"Group '(?P<group>[\w.]+)' does not accept option '(?P<name>[\w.]+)'",
    ):
        if strange := re.search(pattern, message):
            found = strange.groupdict()
            name = f"{found['group']}.{found['name']}" if "group" in found else found["name"]
            return unknown("setting", name, _dotted(kind))
    choice = re.search(r"key \"([\w.]+)\": .*Literal\[(.*?)\]. Got value: (\S+)", message)
    if choice:
        known = re.findall(r"'([^']*)'", choice[2])
        return unknown(choice[1], choice[3], known)
    return message


def _dotted(kind: type, prefix: str = "", of: type | None = None) -> Iterator[str]:
    """Names of all settings, or of those of one type."""
    for name, hint in typing.get_type_hints(kind).items():
        parts: list[Any] = [part for part in (hint, *typing.get_args(hint)) if is_dataclass(part)]
        container = None if parts else typing.get_origin(hint)
        if hint not in parts and of in (None, hint, container):
            yield prefix + name
        for part in parts:  # a group of settings, or a list of them
            yield from _dotted(part, f"{prefix}{name}.", of)
