"""One file per task: where its examples come from."""

from collections.abc import Callable
from dataclasses import replace

from elastic import models
from elastic.classifier import classes_in
from elastic.config import SCORE, TaskConfig, TrainConfig
from elastic.run import Run
from elastic.tasks import arithmetic, hub, instructions, jsonl, llm_adapters
from elastic.tasks.base import Example, Judge, Split, Task

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


def with_classes(config: TrainConfig) -> TrainConfig:
    """The settings as they are, or with the classes named: those that the run began with, of the
    run to go on from, else what the data say."""
    if config.model.classes or not models.classifies(config.model):
        return config
    classes: list[str] = []
    for path in filter(None, (config.run, config.start_from)):
        if not classes and Run(path).config_file.is_file():
            classes = Run(path).begun().model.classes
    if not classes and models.regresses(config.model):
        classes = SCORE
    classes = classes or classes_in(load_task(config.task, config.seed))
    return replace(config, model=replace(config.model, classes=classes))


__all__ = ["TASKS", "Example", "Judge", "Split", "Task", "load_task", "with_classes"]
