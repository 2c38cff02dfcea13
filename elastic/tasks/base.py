"""What a task is: three lists of examples that share nothing, each a prompt and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from elastic.config import TaskConfig

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Example:
    prompt: str
    answer: str
    """Joined to the prompt by a space; training adds the end-of-sequence token."""
    options: tuple[str, ...] = ()
    """If given, the answer is chosen among these by likelihood, else it is generated."""


@dataclass(frozen=True)
class Task:
    """Examples by split, already limited to the configured numbers."""

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]


def limits(config: TaskConfig) -> dict[Split, int]:
    return {
        "train": config.train_examples,
        "validation": config.validation_examples,
        "test": config.test_examples,
    }
