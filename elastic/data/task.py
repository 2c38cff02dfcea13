"""What a task is: three lists of examples that share nothing, each a prompt and its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from elastic.config import TaskConfig
from elastic.errors import DataError

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Judge:
    """How a generated text is judged (`elastic.data.llm_adapters`)."""

    kind: str
    expected: str
    new_tokens: int
    """At most so many are generated."""


@dataclass(frozen=True)
class Example:
    """A prompt and the answer to it."""

    prompt: str
    answer: str
    """Joined to the prompt by a space; training adds the end-of-sequence token."""
    options: tuple[str, ...] = ()
    """If given, the answer is chosen among these by likelihood, else it is generated."""
    judge: Judge | None = None
    """What counts as right in a generated text; None: the very words of the answer."""
    second: str | None = None
    """The other sentence of a pair, for encoders that tell two apart."""
    tolerance: float = 0.5
    """By how much a number may be off to count as right, for models that answer with one."""
    messages: tuple[tuple[str, str], ...] = ()
    """Roles and contents of the conversation that the answer ends, in the place of the prompt."""

    @property
    def text(self) -> str:
        """All that is read, for models that know neither pairs nor conversations."""
        if self.messages:
            return "\n".join(content for _, content in self.messages)
        return self.prompt if self.second is None else f"{self.prompt} {self.second}"


@dataclass(frozen=True)
class Task:
    """Examples by split, already limited to the configured numbers."""

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]


def disjoint(
    train: Sequence[Example],
    validation: Sequence[Example] | None,
    test: Sequence[Example],
    config: TaskConfig,
    where: Mapping[Split, str],
) -> Task:
    """At most the configured numbers of each, in order, no prompt in two splits.

    Test comes first, then validation; without one, the last rows of training are held out.
    DataError names `where` of a split that is left empty.
    """
    wanted = limits(config)
    test = test[: wanted["test"]]
    seen = {example.text for example in test}
    rest = [example for example in train if example.text not in seen]
    if validation is not None:
        validation = [example for example in validation if example.text not in seen]
    else:
        held_out = min(wanted["validation"], len(rest) // 2)
        rest, validation = rest[: len(rest) - held_out], rest[len(rest) - held_out :]
    validation = validation[: wanted["validation"]]
    seen |= {example.text for example in validation}
    train = [example for example in rest if example.text not in seen][: wanted["train"]]
    splits: dict[Split, Sequence[Example]] = {
        "train": train, "validation": validation, "test": test
    }  # fmt: skip
    for name, examples in splits.items():
        if not examples:
            raise DataError(f"{where[name]}: the {name} split is empty once overlaps are removed")
    return Task(**splits)


def limits(config: TaskConfig) -> dict[Split, int]:
    """The most examples of each split."""
    return {
        "train": config.train_examples,
        "validation": config.validation_examples,
        "test": config.test_examples,
    }
