"""Examples from the user's own JSON Lines files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic.config import TaskConfig
from elastic.errors import DataError
from elastic.tasks.base import Example, Task, limits


def load(config: TaskConfig, seed: int) -> Task:
    """Rows in file order. Without a validation file, the last rows of the training file are held
    out. A row whose prompt also stands in the test split is dropped from the other two."""
    test = _read(config.test, config)[: config.test_examples]
    seen = {example.prompt for example in test}
    rest = [example for example in _read(config.train, config) if example.prompt not in seen]
    if config.validation is not None:
        validation = [e for e in _read(config.validation, config) if e.prompt not in seen]
    else:
        held_out = min(config.validation_examples, len(rest) // 2)
        rest, validation = rest[: len(rest) - held_out], rest[len(rest) - held_out :]
    validation = validation[: config.validation_examples]
    seen |= {example.prompt for example in validation}
    train = [example for example in rest if example.prompt not in seen]
    splits = {"train": train[: config.train_examples], "validation": validation, "test": test}
    for name in limits(config):
        if not splits[name]:
            file = getattr(config, name) or config.train
            raise DataError(f"{file}: the {name} split is empty once overlaps are removed")
    return Task(**splits)


def _read(file: str, config: TaskConfig) -> Sequence[Example]:
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{file}: no such data file")
    examples = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    examples.append(_example(line, config, f"{file}:{number}"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text: {error.reason}") from None
    if not examples:
        raise DataError(f"{file}: empty; expected one JSON object per line")
    return examples


def _example(line: str, config: TaskConfig, where: str) -> Example:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    try:
        shown = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
        prompt = config.prompt.format_map(shown)
        answer = "" if row[config.answer] is None else str(row[config.answer])
        options = tuple(map(str, _list(row[config.options]))) if config.options else ()
    except KeyError as error:
        raise DataError(
            f"{where}: field {error.args[0]!r} is missing; the row has {', '.join(sorted(row))} "
            "(task.prompt, task.answer and task.options name the fields to use)"
        ) from None
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise DataError(f"{where}: task.prompt {config.prompt!r}: {error}") from None
    if not answer:
        raise DataError(f"{where}: the answer in field {config.answer!r} is empty")
    if config.options and answer not in options:
        raise DataError(f"{where}: answer {answer!r} is not among the options {list(options)}")
    return Example(prompt, answer, options)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [part.strip() for part in str(value).split(",")]
