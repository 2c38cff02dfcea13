"""Rows of the user's data: from JSON or JSON Lines files, and what an example is made of."""

from __future__ import annotations

import functools
import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic.config import TaskConfig
from elastic.data.task import Example, Split, Task, disjoint
from elastic.errors import DataError, DataMissing

CHAT = "chat"
"""The template of rows with `messages`."""
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""Stanford Alpaca's prompts (Taori et al. 2023)."""
TEMPLATES = {"alpaca": ALPACA, "alpaca-input": ALPACA_INPUT}


def read_json(file: Path | str) -> Any:
    """What a JSON file holds; DataError names the line that is broken."""
    text = _text(file)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: broken JSON: {error.msg}") from None


def read_rows(file: Path | str) -> list[tuple[str, Mapping[str, Any]]]:
    """Rows of a JSON list, or of JSON Lines, each with where it stands; DataError names the line
    that is no object."""
    text = _text(file)
    listed = text.lstrip().startswith("[") and Path(file).suffix != ".jsonl"
    if listed:
        rows = [(f"{file}: row {number}", row) for number, row in enumerate(read_json(file), 1)]
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = [(f"{file}:{n}", _line(line, f"{file}:{n}")) for n, line in lines if line.strip()]
    if not rows:
        raise DataError(f"{file}: no rows; expected a JSON list, or one JSON object per line")
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return rows


def from_files(config: TaskConfig, example: Callable[[Mapping[str, Any], str], Example]) -> Task:
    """Rows of the configured files in their order, made examples. Without a validation file the
    last rows of the training file are held out. A row whose prompt also stands in the test split is
    dropped from the other two."""

    def read(file: str) -> list[Example]:
        return [example(row, where) for where, row in read_rows(file)]

    assert config.train is not None and config.test is not None
    test, train = read(config.test), read(config.train)
    validation = None if config.validation is None else read(config.validation)
    files: dict[Split, str] = {
        "train": config.train, "validation": config.validation or config.train, "test": config.test
    }  # fmt: skip
    return disjoint(train, validation, test, config, files)


def _text(file: Path | str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise DataMissing(f"{file}: no such data file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text: {error.reason}") from None


def _line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from None


def example_of(row: Mapping[str, Any], config: TaskConfig, where: str) -> Example:
    """By the templates and fields that the settings name; DataError says which the row at `where`
    lacks, or cannot fill."""
    if config.prompt == CHAT:
        return _conversation(row, where)
    known = {k: v for k, v in row.items() if v is not None}
    shown = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in known.items()}
    template = template_of(config.prompt)
    try:
        prompt = template.format_map(shown)
        second = None if config.second is None else config.second.format_map(shown)
        said = row[config.answer]
        options = tuple(map(str, _list(known[config.options]))) if config.options else ()
    except KeyError as error:
        name = error.args[0]
        lacks = "null" if name in row else "missing"
        raise DataError(
            f"{where}: field {name!r} is {lacks}; the row has {', '.join(sorted(known))} "
            "(task.prompt, task.second, task.answer and task.options name the fields to use)"
        ) from None
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        templates = " ".join(filter(None, (config.prompt, config.second)))
        raise DataError(f"{where}: task.prompt {templates!r}: {error}") from None
    answer = text_of(said, f"{where}: the answer in field {config.answer!r}")
    if not answer:
        raise DataError(f"{where}: the answer in field {config.answer!r} is empty")
    if config.options and answer not in options:
        raise DataError(f"{where}: answer {answer!r} is not among the options {list(options)}")
    return Example(prompt, answer, options, second=second, tolerance=config.tolerance)


def text_of(value: Any, where: str) -> str:
    """What a field says, nothing for null; DataError if it says several things at once."""
    if isinstance(value, list | dict):
        raise DataError(f"{where} is {reprlib.repr(value)}; give one text, number, true or false")
    return "" if value is None else str(value)


@functools.cache
def template_of(prompt: str) -> str:
    """A template by its name, from a text file, or as it is."""
    if prompt in TEMPLATES:
        return TEMPLATES[prompt]
    return _text(prompt).removesuffix("\n") if prompt.endswith(".txt") else prompt


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [part.strip() for part in str(value).split(",")]


def _conversation(row: Mapping[str, Any], where: str) -> Example:
    """The last message is the answer; those before it are put in the model's own words."""
    messages: Any = row.get("messages")
    told = isinstance(messages, list) and all(
        isinstance(each, dict) and isinstance(each.get("content"), str) and each.get("role")
        for each in messages
    )
    if not told:
        raise DataError(
            f"{where}: task.prompt chat wants `messages`, a list of objects with role and content"
        )
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise DataError(f"{where}: the last message must be the assistant's, and not the only one")
    before = tuple((str(each["role"]), each["content"]) for each in messages[:-1])
    return Example(before[-1][1], messages[-1]["content"], messages=before)


def load(config: TaskConfig, seed: int) -> Task:
    """Of rows whose fields the settings name."""
    return from_files(config, lambda row, where: example_of(row, config, where))
