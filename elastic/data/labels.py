"""The answers of a task as classes, or as numbers."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Sequence

from elastic.console import say
from elastic.data.task import SPLITS, Task
from elastic.errors import DataError
from elastic.models.kinds import is_number

MOST = 200
"""Distinct answers above which they are hardly classes."""
MOST_SAID = 20
REPEATED = 4
"""Training examples of an answer, on average, from which answers are taken for a closed set."""


def number_in(answer: str) -> float:
    """What a regression head is to answer; DataError if that is no number."""
    try:
        value = float(answer)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"answer {answer!r} is no number, which a regression head answers with; choose "
            "model.head classification, or another task.answer"
        )
    return value


def check_classes(task: Task, classes: Sequence[str]) -> None:
    """DataError when an example of any split is of none of the classes, or no number."""
    for split in SPLITS:
        answers = {example.answer for example in task.split(split)}
        if is_number(classes):
            for answer in answers:
                number_in(answer)
        elif strange := sorted(answers - set(classes)):
            source = task.sources.get(split)
            of = f" ({source})" if source else ""
            raise DataError(
                f"the {split} rows{of} have answers that are no class of the head: "
                f"{', '.join(strange[:5])}; name all classes with model.classes (now "
                f"{', '.join(classes[:8])})"
            )


def untrained(task: Task) -> str | None:
    """What to say of answers that are asked for and never trained, where all answers are a few that
    come again and again; None where there are none."""
    trained = {example.answer for example in task.train}
    asked: dict[str, Counter[str]] = {
        split: Counter(example.answer for example in task.split(split))
        for split in SPLITS
        if split != "train"
    }
    every = trained.union(*asked.values())
    if len(every) > MOST_SAID or len(every) * REPEATED > len(task.train):
        return None
    missing = [
        f"{sum(each[answer] for answer in each if answer not in trained)} of the "
        f"{each.total()} {split} examples have the answers "
        f"{', '.join(repr(answer) for answer in sorted(each) if answer not in trained)}"
        for split, each in asked.items()
        if each.keys() - trained
    ]
    return f"{'; '.join(missing)}, which no training example has" if missing else None


def classes_in(task: Task) -> list[str]:
    """The answers of the training split, sorted, numbers by size, which says how many there are of
    each. DataError when two of them are hardly meant to be told apart."""
    counts = Counter(example.answer for example in task.train)
    found = sorted(counts)
    if not 2 <= len(found) <= MOST:
        some = ", ".join(map(repr, found[:3]))
        raise DataError(
            f"the training split has {len(found)} distinct answers ({some}, ...); a classification "
            f"head tells 2 to {MOST} apart. Name them with model.classes, or answer with text: "
            "model.head language"
        )
    _refuse_alike(task, counts)
    if all(name.isdecimal() for name in found):
        found.sort(key=int)
    some = ", ".join(f"{name} ({counts[name]})" for name in found[:MOST_SAID])
    say(f"Classes of the training data: {some}{', ...' * (len(found) > MOST_SAID)}")
    return found


def _refuse_alike(task: Task, counts: Counter[str]) -> None:
    """DataError when answers differ in how they are written alone."""
    seen: dict[str | float, str] = {}
    for name in counts:
        other = seen.setdefault(_meant(name), name)
        if other != name:
            both = " and ".join(
                f"{each!r} ({counts[each]} rows, first {_first(task, each)})"
                for each in (other, name)
            )
            raise DataError(
                f"the training split has the answers {both}, which differ in case, in blanks or in "
                "how a number is written alone; write them alike, or name both with model.classes"
            )


def _meant(name: str) -> str | float:
    """The same for names that differ in case, in blanks or in how a number is written alone."""
    plain = " ".join(name.casefold().split())
    try:
        number = float(plain)
    except ValueError:
        return plain
    return number if math.isfinite(number) else plain


def _first(task: Task, answer: str) -> str:
    text = next(example.text for example in task.train if example.answer == answer)
    return repr(textwrap.shorten(text, 60, placeholder="..."))
