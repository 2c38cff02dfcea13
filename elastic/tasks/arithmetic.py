"""Arithmetic word problems, made here: no download, no overlap between splits.

One or two steps with numbers up to twenty, in many wordings. An untrained small model answers
almost none of them exactly, a trained one about half: there is room above and below, so a
sub-adapter that has lost something shows it.
"""

from __future__ import annotations

import hashlib
import random

from elastic.config import TaskConfig
from elastic.tasks.base import Example, Split, Task, limits

NAMES = ("Tom", "Ann", "Sam", "Ben", "Max", "Tim", "Dan", "Kim", "Bob", "Jim", "Lee")
THINGS = ("apples", "books", "coins", "cards", "shells", "eggs", "pens", "stamps", "keys", "toys")
LARGEST = 20
# Short sentences: a demo on two cores pays for every token of every example.
FIRST = ("{n} has {a} {t}", "{n} owns {a} {t}", "{n} holds {a} {t}")
MORE = (", buys {b}", ", finds {b}", ", gets {b}", ", wins {b}")
FEWER = (", sells {b}", ", loses {b}", ", gives {b}", ", drops {b}")
QUESTION = ". How many?"


def load(config: TaskConfig, seed: int) -> Task:
    """Distinct problems; which split one belongs to depends on its text alone, so no seed and no
    count can move a problem from training into a test."""
    wanted = limits(config)
    found: dict[Split, dict[str, Example]] = {split: {} for split in wanted}
    generator = random.Random(seed)
    missing = sum(wanted.values())
    while missing:
        example = _problem(generator)
        split = _split(example.prompt)
        if len(found[split]) < wanted[split] and example.prompt not in found[split]:
            found[split][example.prompt] = example
            missing -= 1
    return Task(*(tuple(found[split].values()) for split in ("train", "validation", "test")))


def _split(prompt: str) -> Split:
    bucket = hashlib.sha256(prompt.encode()).digest()[0]
    return "validation" if bucket < 32 else "test" if bucket < 96 else "train"


def _problem(generator: random.Random) -> Example:
    name, thing = generator.choice(NAMES), generator.choice(THINGS)
    total = generator.randint(2, LARGEST)
    text = generator.choice(FIRST).format(n=name, a=total, t=thing)
    for _ in range(generator.choice((1, 1, 2))):
        if total > 3 and generator.random() < 0.5:
            number = generator.randint(2, min(total - 1, LARGEST))
            text += generator.choice(FEWER).format(b=number)
            total -= number
        else:
            number = generator.randint(2, LARGEST)
            text += generator.choice(MORE).format(b=number)
            total += number
    return Example(text + QUESTION, str(total))
