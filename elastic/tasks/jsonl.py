"""Examples from the user's own JSON Lines files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic.config import TaskConfig
from elastic.errors import DataError, DataMissing
from elastic.tasks.base import Example, Task, disjoint, limits


def load(config: TaskConfig, seed: int) -> Task:
    """Rows in file order. Without a validation file, the last rows of the training file are held
    out. A row whose prompt also stands in the test split is dropped from the other two."""
    files = {split: getattr(config, split) or config.train for split in limits(config)}
    test, train = _read(config.test, config), _read(config.train, config)
    validation = None if config.validation is None else _read(config.validation, config)
    return disjoint(train, validation, test, config, files)


def _read(file: str, config: TaskConfig) -> Sequence[Example]:
    path = Path(file)
    if not path.is_file():
        raise DataMissing(f"{file}: no such data file")
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
