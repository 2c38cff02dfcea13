"""Examples from the user's own JSON or JSON Lines files."""

from __future__ import annotations

from collections.abc import Sequence

from elastic.config import TaskConfig
from elastic.tasks.base import Example, Task, disjoint, limits
from elastic.tasks.rows import example_of, read_rows


def load(config: TaskConfig, seed: int) -> Task:
    """Rows in file order. Without a validation file, the last rows of the training file are held
    out. A row whose prompt also stands in the test split is dropped from the other two."""
    files = {split: getattr(config, split) or config.train for split in limits(config)}
    test, train = _read(config.test, config), _read(config.train, config)
    validation = None if config.validation is None else _read(config.validation, config)
    return disjoint(train, validation, test, config, files)


def _read(file: str, config: TaskConfig) -> Sequence[Example]:
    return [example_of(row, config, where) for where, row in read_rows(file)]
