"""Examples from the user's own JSON or JSON Lines files."""

from __future__ import annotations

from elastic.config import TaskConfig
from elastic.tasks.base import Task
from elastic.tasks.rows import example_of, from_files


def load(config: TaskConfig, seed: int) -> Task:
    """Of rows whose fields the settings name."""
    return from_files(config, lambda row, where: example_of(row, config, where))
