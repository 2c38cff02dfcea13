"""Arithmetic word problems, made here: no download, no overlap between splits.

One step with numbers up to twenty, in several wordings. The untrained base of the demo answers
almost none of them exactly, after a hundred steps of training more than half: there is room above
and below, so a sub-adapter that has lost something shows it.
"""

from __future__ import annotations

import hashlib
import random

from elastic.config import TaskConfig
from elastic.data.task import SPLITS, Example, Split, Task, limits

NAMES = ("Tom", "Ann", "Sam", "Ben", "Max", "Tim", "Dan", "Kim", "Bob", "Jim", "Lee")
THINGS = ("apples", "books", "coins", "cards", "shells", "eggs", "pens", "stamps", "keys", "toys")
LARGEST = 20
FIRST = ("{n} has {a} {t}", "{n} owns {a} {t}")
MORE = (" and buys {b} more", ", then finds {b}", " and gets {b} more")
FEWER = (" and sells {b}", ", then loses {b}", " and gives away {b}")
LAST = (". How many {t} now?", ". How many are left?")


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
    train, validation, test = (tuple(found[split].values()) for split in SPLITS)
    return Task(train, validation, test)


def _split(prompt: str) -> Split:
    bucket = hashlib.sha256(prompt.encode()).digest()[0]
    return "validation" if bucket < 32 else "test" if bucket < 96 else "train"


def _problem(generator: random.Random) -> Example:
    name, thing = generator.choice(NAMES), generator.choice(THINGS)
    total = generator.randint(4, LARGEST)
    text = generator.choice(FIRST).format(n=name, a=total, t=thing)
    fewer = generator.random() < 0.5
    number = generator.randint(2, total - 1 if fewer else LARGEST)
    text += generator.choice(FEWER if fewer else MORE).format(b=number)
    total += -number if fewer else number
    return Example(text + generator.choice(LAST).format(t=thing), str(total))
