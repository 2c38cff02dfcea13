"""Examples of the user's rows: by the templates and fields that the settings name."""

from __future__ import annotations

import functools
import json
import math
import random
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from string import Formatter
from typing import Any

from elastic.config import TaskConfig
from elastic.data.reading import read_rows, read_text
from elastic.data.task import Example, Split, Task, disjoint, limits
from elastic.errors import DataError

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
_HALF = re.compile("[\ud800-\udfff]")
"""Surrogates, which Python's texts can have and no encoding has."""
ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def from_files(
    config: TaskConfig, seed: int, example: Callable[[Mapping[str, Any], str], Example]
) -> Task:
    """Rows of the configured files, made examples, drawn by the seed; a test file that is used as a
    whole stays in order. Without a validation file some rows of the training file are held out. A
    row whose prompt also stands in the test split is dropped from the other two."""

    def read(file: str, split: Split) -> list[Example]:
        found = [example(row, where) for where, row in read_rows(file)]
        if config.draw == "seed" and (split != "test" or len(found) > limits(config)[split]):
            random.Random(f"{seed}/{split}").shuffle(found)
        return found

    assert config.train is not None and config.test is not None
    test, train = read(config.test, "test"), read(config.train, "train")
    validation = None if config.validation is None else read(config.validation, "validation")
    files: dict[Split, str] = {
        "train": config.train, "validation": config.validation or config.train, "test": config.test
    }  # fmt: skip
    return disjoint(train, validation, test, config, files)


def example_of(row: Mapping[str, Any], config: TaskConfig, where: str) -> Example:
    """By the templates and fields that the settings name; DataError says which the row at `where`
    lacks, or cannot fill."""
    if config.prompt == CHAT:
        return _conversation(row, config, where)
    known = {k: v for k, v in row.items() if v is not None}
    try:
        prompt = FILLING.vformat(template_of(config.prompt), (), known)
        second = None if config.second is None else FILLING.vformat(
            template_of(config.second), (), known
        )  # fmt: skip
        said = row[config.answer]
        listed = _list(known[config.options]) if config.options else ()
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
    answer = answer_of(said, f"{where}: the answer in field {config.answer!r}")
    option = f"{where}: an option in field {config.options!r}"
    options = tuple(answer_of(one, option) for one in listed)
    if config.options and answer not in options:
        raise DataError(f"{where}: answer {answer!r} is not among the options {list(options)}")
    return Example(
        prompt, answer, options, second=second, tolerance=config.tolerance, cutoff=config.cutoff,
        where=where,
    )  # fmt: skip


class Filling(Formatter):
    """Templates whose fields hold one text or number each, or a list of them: commas join it."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        """ValueError, which names the field, for what would be written as Python writes it."""
        value, first = super().get_field(field_name, args, kwargs)
        try:
            if isinstance(value, list):
                value = ", ".join(str(_plain(part)) for part in value)
            return _plain(value), first
        except ValueError as error:
            raise ValueError(f"field {field_name!r} is {error}") from None


FILLING = Filling()


def _plain(value: Any) -> Any:
    """A value that one text can say; ValueError for others."""
    if isinstance(value, str):
        if _HALF.search(value):
            raise ValueError(f"{value!r:.80}, of which half a character is no text")
        return value
    infinite = isinstance(value, Real) and not math.isfinite(value)
    if value is None or isinstance(value, Iterable) or infinite or _is_missing(value):
        raise ValueError(f"{reprlib.repr(value)}; give one text, number, true or false")
    return value


def _is_missing(value: Any) -> bool:
    """Whether it is one of the values by which libraries say that there is none."""
    try:
        return bool(value != value)
    except TypeError:  # pandas.NA is neither equal to itself nor not
        return True


def answer_of(value: Any, where: str) -> str:
    """What a field says; DataError if that is nothing, or nothing but blanks."""
    answer = text_of(value, where)
    if not answer.strip():
        raise DataError(f"{where} is {repr(answer) + ', blank' if answer else 'empty'}")
    return answer


def text_of(value: Any, where: str) -> str:
    """What a field says, nothing for null; DataError if it says several things at once."""
    try:
        return "" if value is None else str(_plain(value))
    except ValueError as error:
        raise DataError(f"{where} is {error}") from None


@functools.cache
def template_of(prompt: str) -> str:
    """A template by its name, from a text file, or as it is but for its escapes: in single quotes a
    shell leaves \\n as it is."""
    if prompt in TEMPLATES:
        return TEMPLATES[prompt]
    if prompt.endswith(".txt"):
        return read_text(prompt).removesuffix("\n")
    return re.sub(r"\\([nt\\])", lambda escape: ESCAPES[escape[1]], prompt)


def _list(value: Any) -> Sequence[Any]:
    return (
        value
        if isinstance(value, list | tuple)
        else [part.strip() for part in str(value).split(",")]
    )


def _conversation(row: Mapping[str, Any], config: TaskConfig, where: str) -> Example:
    """The last message is the answer; those before it are put in the model's own words."""
    messages: Any = row.get("messages")
    if messages is None:
        lacks = "null" if "messages" in row else "missing"
        told = ", ".join(sorted(name for name in row if row[name] is not None))
        raise DataError(
            f"{where}: field 'messages' is {lacks}; task.prompt chat reads it; the row has {told}"
        )
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise DataError(
            f"{where}: field 'messages' is {reprlib.repr(messages)}; task.prompt chat wants a list "
            "of objects with role and content"
        )
    whole = [
        _message(each, f"{where}: message {number} of {len(messages)}")
        for number, each in enumerate(messages, 1)
    ]
    if len(whole) < 2 or whole[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last message must be the assistant's, and not the only one")
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(each, dict) for each in tools):
        raise DataError(
            f"{where}: field 'tools' is {reprlib.repr(tools)}; give a list of objects, as chat "
            "templates take them"
        )
    *before, reply = whole
    answer = reply.get("content") or ""
    if not answer.strip() and not reply.get("tool_calls"):
        raise DataError(f"{where}: the content of the last message, the answer, is blank")
    answer = answer if answer.strip() else json.dumps(reply["tool_calls"], ensure_ascii=False)
    return Example(
        before[-1].get("content") or "", answer, messages=tuple(before), reply=reply,
        tools=tuple(tools), cutoff=config.cutoff, where=where,
    )  # fmt: skip


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message as a chat template takes it, without what is null."""
    found = {name: value for name, value in message.items() if value is not None}
    if not isinstance(found.get("role"), str) or not found["role"]:
        raise DataError(f"{where}: it has no role, such as user or assistant")
    content = found.get("content")
    if content is None and not found.get("tool_calls"):
        lacks = "null" if "content" in message else "missing"
        raise DataError(f"{where}: its content is {lacks}; give a text")
    if isinstance(content, str) and _HALF.search(content):
        raise DataError(f"{where}: half a character in {content!r:.80}, which no tokenizer reads")
    if content is not None and not isinstance(content, str):
        raise DataError(f"{where}: its content is {reprlib.repr(content)}; give one text")
    return found


def load(config: TaskConfig, seed: int) -> Task:
    """Of rows whose fields the settings name."""
    return from_files(config, seed, lambda row, where: example_of(row, config, where))
