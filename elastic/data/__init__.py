"""Where examples come from: one file for each source of data, which `TASKS` names; examples as
tokens, as batches, and the logits of their answers. Imports `elastic.models` and what is
below it."""

from __future__ import annotations

from collections.abc import Callable

from elastic.config import TaskConfig
from elastic.console import busy
from elastic.data import arithmetic, hub, instructions, llm_adapters, rows
from elastic.data.task import Example, Judge, Split, Task

TASKS: dict[str, Callable[[TaskConfig, int], Task]] = {
    "arithmetic": arithmetic.load,
    "jsonl": rows.load,
    "datasets": hub.load,
    "instructions": instructions.load,
    "llm_adapters": llm_adapters.load,
}


def load_task(config: TaskConfig, seed: int) -> Task:
    """The examples of the configured task; the same seed gives the same ones."""
    with busy("reading data"):
        return TASKS[config.name](config, seed)


__all__ = ["TASKS", "Example", "Judge", "Split", "Task", "load_task"]
