"""One file per task: where its examples come from."""

from collections.abc import Callable

from elastic.config import TaskConfig
from elastic.tasks import arithmetic, instructions, jsonl
from elastic.tasks.base import Example, Split, Task

TASKS: dict[str, Callable[[TaskConfig, int], Task]] = {
    "arithmetic": arithmetic.load,
    "jsonl": jsonl.load,
    "instructions": instructions.load,
}


def load_task(config: TaskConfig, seed: int) -> Task:
    """The examples of the configured task; the same seed gives the same ones."""
    return TASKS[config.name](config, seed)


__all__ = ["TASKS", "Example", "Split", "Task", "load_task"]
