"""Command line and YAML to configuration; the only room that knows the CLI library."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import reprlib
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import (
    ArgumentError,
    ArgumentParser,
    Namespace,
    get_loader,
    set_loader,
    set_parsing_settings,
)

from elastic import plain
from elastic.errors import ConfigError, unknown
from elastic.files import shipped

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


SHORT = {r"adapter\.from": "adapter.taken_from", "recover": "recover.steps"}
"""What the command line calls settings that cannot have these names."""

# A setting is explained by the docstring under its field.
set_parsing_settings(docstring_parse_attribute_docstrings=True)
LARGEST = 2**63
"""Integers that nothing here can be, and some become no float."""
PLAIN = "plain"
"""YAML as the library reads it, once it is known to be plain data."""


def _load_plain(text: str) -> Any:
    plain.check_yaml(text)
    return get_loader("yaml")(text)


set_loader(PLAIN, _load_plain, exceptions=(yaml.YAMLError, ValueError, RecursionError))


def parse(
    kind: type[Config], arguments: Sequence[str] | None = None, prog: str | None = None
) -> Config:
    """A configuration from the command line: YAML by --config, dotted flags over it.

    A first argument without dashes is the first setting, mostly the run directory. ConfigError on
    anything unknown.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:  # of a file with such a name
            raise ConfigError(f"{argument!r} is not UTF-8; rename what it names") from None
    if arguments and not arguments[0].startswith("-"):
        arguments[:1] = [f"--{dataclasses.fields(kind)[0].name}", arguments[0]]
    for short, name in SHORT.items():
        arguments = [re.sub(rf"^--{short}(?==|$)", f"--{name}", a) for a in arguments]
    parser = _parser(kind, prog)
    arguments = _with_values(kind, _with_recipes(_continuing(kind, arguments)))
    _require_plain(kind, arguments)
    return _build(kind, parser, lambda: parser.parse_args(arguments))


def from_dict(kind: type[Config], value: Mapping[str, Any], where: str) -> Config:
    """A configuration from what a file held, of whomsoever; ConfigError names the file."""
    parser = _parser(kind)
    try:
        _require_settings(kind, value)
        return _build(kind, parser, lambda: parser.parse_object(dict(value)))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


@functools.cache
def _parser(kind: type, prog: str | None = None) -> ArgumentParser:
    """Made once: reading the docstring of every setting takes half a second."""
    description = " ".join((kind.__doc__ or "").split())
    parser = ArgumentParser(
        prog=prog, description=description, parser_mode=PLAIN, exit_on_error=False,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", action="config", help="YAML file, or the name of a recipe.")
    parser.add_class_arguments(kind)
    return parser


def _build(kind: type[Config], parser: ArgumentParser, read: Callable[[], Namespace]) -> Config:
    try:
        values = vars(parser.instantiate(read()))
    except ConfigError:
        raise
    except (ArgumentError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError(_reason(kind, str(error))) from None
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})


def _require_plain(kind: type, arguments: Sequence[str]) -> None:
    """ConfigError unless recipes, and what flags give for groups of settings, are settings; before
    the library reads any of it."""
    groups = dict(_groups(kind))
    for argument, following in itertools.pairwise([*arguments, ""]):
        flag, equals, value = argument.partition("=")
        value = value if equals else following
        name = flag.removeprefix("--").replace("+", "")  # one more of a list
        if flag == "--config":
            found = plain.read_yaml(value)
            try:
                _require_settings(kind, found)
            except ConfigError as error:
                raise ConfigError(f"{value}: {error}") from None
        elif name in groups:
            found = plain.parse_yaml(value, flag)
            if flag.endswith("+") and not isinstance(found, list):
                found = [found]
            _require_value(groups[name], found, name)
        elif name.partition(".")[0] in groups:
            _require_settings(kind, {name: value})


def _require_settings(kind: type, value: Any, group: str = "") -> None:
    """ConfigError unless `value` is a mapping of settings of this dataclass, all the way down.

    Where it is something else the library would look for a class of that name and import its
    module; and it would take null for anything.
    """
    if not isinstance(value, Mapping):
        what = group or "a configuration"
        raise ConfigError(f"{what} is {reprlib.repr(value)}; give a mapping of settings")
    start, hints = f"{group}." if group else "", typing.get_type_hints(kind)
    for key, inner in value.items():
        name, dot, rest = str(key).partition(".")
        hint = hints.get(name)
        if hint is None or (dot and not _parts(hint)):
            if isinstance(inner, Mapping) and inner:
                key = f"{key}.{next(iter(inner))}"
            raise ConfigError(unknown("setting", f"{start}{key}", _dotted(kind, start)))
        if dot:
            inner = [{rest: inner}] if typing.get_origin(hint) is list else {rest: inner}
        _require_value(hint, inner, f"{start}{name}")


def _require_value(hint: Any, value: Any, name: str) -> None:
    """The same for one setting, a group of them or a list of groups; what else a setting may be the
    library sees to."""
    parts = _parts(hint)
    if value is None:
        if type(None) not in typing.get_args(hint):
            raise ConfigError(f"{name} is null; give a value, or leave it out")
    elif isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{name} is {value!r}; no text here has a NUL in it")
    elif isinstance(value, int) and abs(value) >= LARGEST:
        raise ConfigError(f"{name} is {reprlib.repr(value)}; give a number that is not so large")
    elif parts and typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{name} is {reprlib.repr(value)}; give a list")
        for one in value:
            _require_settings(parts[0], one, name)
    elif parts:
        _require_settings(parts[0], value, name)


def _groups(kind: type, start: str = "") -> Iterator[tuple[str, Any]]:
    """Names and types of all groups of settings, and of lists of them."""
    for name, hint in typing.get_type_hints(kind).items():
        for part in _parts(hint):
            yield f"{start}{name}", hint
            yield from _groups(part, f"{start}{name}.")


def _parts(hint: Any) -> list[Any]:
    """The dataclass that a setting of this type is, or is a list of."""
    return [part for part in (hint, *typing.get_args(hint)) if is_dataclass(part)]


def _continuing(kind: type, arguments: list[str]) -> list[str]:
    """`--from RUN` is that run's settings, but the consent to run its base's code, with
    `--start_from RUN` and a directory beside it."""
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
    trained += ["--model.trust_remote_code", "false"]  # which is said anew, whosever run this is
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
        parts = _parts(hint)
        container = None if parts else typing.get_origin(hint)
        if hint not in parts and of in (None, hint, container):
            yield prefix + name
        for part in parts:  # a group of settings, or a list of them
            yield from _dotted(part, f"{prefix}{name}.", of)
