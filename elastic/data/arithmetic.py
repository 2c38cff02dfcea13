"""Arithmetic word problems, made here: no download, no overlap between splits.

One step with numbers up to `task.largest`, in several wordings. The untrained base of the demo
answers almost none of them exactly. Numbers up to ten are learnt in a hundred steps of training,
those up to twenty leave room above after them: a sub-adapter that has lost something shows it.
"""

from __future__ import annotations

import hashlib
import random

from elastic.config import TaskConfig
from elastic.data.task import SPLITS, Example, Split, Task, limits
from elastic.errors import DataError

NAMES = ("Tom", "Ann", "Sam", "Ben", "Max", "Tim", "Dan", "Kim", "Bob", "Jim", "Lee")
THINGS = ("apples", "books", "coins", "cards", "shells", "eggs", "pens", "stamps", "keys", "toys")
FIRST = ("{n} has {a} {t}", "{n} owns {a} {t}")
MORE = (" and buys {b} more", ", then finds {b}", " and gets {b} more")
FEWER = (" and sells {b}", ", then loses {b}", " and gives away {b}")
IN_VAIN = 20_000
"""Problems drawn one after another without a new one, after which there are no more."""
LAST = (". How many {t} now?", ". How many are left?")


def load(config: TaskConfig, seed: int) -> Task:
    """Distinct problems; which split one belongs to depends on its text alone, so no seed and no
    count can move a problem from training into a test. DataError where there are not so many."""
    wanted = limits(config)
    found: dict[Split, dict[str, Example]] = {split: {} for split in wanted}
    generator = random.Random(seed)
    missing, in_vain = sum(wanted.values()), 0
    while missing:
        example = _problem(generator, config.largest)
        split, in_vain = _split(example.prompt), in_vain + 1
        if len(found[split]) < wanted[split] and example.prompt not in found[split]:
            found[split][example.prompt] = example
            missing, in_vain = missing - 1, 0
        if in_vain == IN_VAIN:
            short = next(name for name in SPLITS if len(found[name]) < wanted[name])
            raise DataError(
                f"task arithmetic: {wanted[short]} {short} examples, but numbers up to "
                f"{config.largest} make about {len(found[short])}; ask for fewer, or give a larger "
                "task.largest"
            )
    train, validation, test = (tuple(found[split].values()) for split in SPLITS)
    return Task(train, validation, test)


def _split(prompt: str) -> Split:
    bucket = hashlib.sha256(prompt.encode()).digest()[0]
    return "validation" if bucket < 32 else "test" if bucket < 96 else "train"


def _problem(generator: random.Random, largest: int) -> Example:
    name, thing = generator.choice(NAMES), generator.choice(THINGS)
    total = generator.randint(4, largest)
    text = generator.choice(FIRST).format(n=name, a=total, t=thing)
    fewer = generator.random() < 0.5
    number = generator.randint(2, total - 1 if fewer else largest)
    text += generator.choice(FEWER if fewer else MORE).format(b=number)
    total += -number if fewer else number
    return Example(text + generator.choice(LAST).format(t=thing), str(total))
