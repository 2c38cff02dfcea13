"""What a task is: three lists of examples that share nothing, each a prompt and its answer."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from elastic.config import TaskConfig
from elastic.errors import DataError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


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
    messages: tuple[Mapping[str, Any], ...] = ()
    """The conversation that the answer ends, in the place of the prompt: whole messages, as a chat
    template takes them."""
    reply: Mapping[str, Any] = field(default_factory=dict)
    """The message that the answer is, where there are messages."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """What the assistant may call, as a chat template takes it."""
    cutoff: int | None = None
    """Tokens beyond which the start of the prompt is cut."""
    where: str = field(default="", compare=False)
    """File and line, or data set and row."""

    @property
    def text(self) -> str:
        """All that is read, for models that know neither pairs nor conversations."""
        if self.messages:
            return "\n".join(each["content"] for each in self.messages if each.get("content"))
        return self.prompt if self.second is None else f"{self.prompt} {self.second}"


@dataclass(frozen=True)
class Source:
    """What a split was drawn from."""

    where: str
    """A file, a folder, or a data set and its split."""
    rows: int
    held_out: bool = False
    """Validation rows without a source of their own: of the training rows."""

    def __str__(self) -> str:
        return f"{self.where}, held out" if self.held_out else self.where


@dataclass(frozen=True)
class Task:
    """Examples by split, already limited to the configured numbers."""

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    sources: Mapping[Split, Source] = field(default_factory=dict, compare=False)
    """None for examples that are made, not read."""

    def split(self, name: Split) -> Sequence[Example]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    @property
    def has_chat(self) -> bool:
        """Whether its prompts are conversations."""
        return any(example.messages for example in self.train)

    def drawn(self) -> str:
        """Of how many rows each split is, where there are more; empty where there are not."""
        return ", ".join(
            f"{name} {len(self.split(name)):,} of {source.rows:,} rows of {Path(source.where).name}"
            for name, source in self.sources.items()
            if source.rows > len(self.split(name))
        )


def disjoint(
    train: Sequence[Example],
    validation: Sequence[Example] | None,
    test: Sequence[Example],
    config: TaskConfig,
    where: Mapping[Split, str],
    rows: Mapping[Split, int] | None = None,
) -> Task:
    """At most the configured numbers of each, in order, no prompt in two splits.

    Test comes first, then validation; without one, the last rows of training are held out.
    `rows` says how many there were, where not all of them were read. DataError names `where` of a
    split that is left empty.
    """
    wanted = limits(config)
    read: dict[Split, Sequence[Example]] = {
        "train": train, "validation": train if validation is None else validation, "test": test
    }  # fmt: skip
    sources = {
        split: Source(
            where[split],
            (rows or {}).get(split, len(read[split])),
            held_out=split == "validation" and validation is None,
        )
        for split in read
    }
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
    return Task(**splits, sources=sources)


def some(examples: Sequence[Example], most: int | None, seed: int = 0) -> Sequence[Example]:
    """At most so many, drawn by the seed, in their order."""
    if most is None or most >= len(examples):
        return examples
    drawn = random.Random(seed).sample(range(len(examples)), most)
    return [examples[number] for number in sorted(drawn)]


def limits(config: TaskConfig) -> dict[Split, int]:
    """The most examples of each split."""
    return {
        "train": config.train_examples,
        "validation": config.validation_examples,
        "test": config.test_examples,
    }
