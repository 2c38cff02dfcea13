"""One file per task: where its examples come from."""

from __future__ import annotations

from collections.abc import Callable

from elastic.config import TaskConfig
from elastic.tasks import arithmetic, hub, instructions, jsonl, llm_adapters
from elastic.tasks.base import Task

TASKS: dict[str, Callable[[TaskConfig, int], Task]] = {
    "arithmetic": arithmetic.load,
    "jsonl": jsonl.load,
    "datasets": hub.load,
    "instructions": instructions.load,
    "llm_adapters": llm_adapters.load,
}


def load_task(config: TaskConfig, seed: int) -> Task:
    """The examples of the configured task; the same seed gives the same ones."""
    return TASKS[config.name](config, seed)


__all__ = ["TASKS", "Example", "Judge", "Split", "Task", "load_task", "with_classes"]
