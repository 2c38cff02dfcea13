"""How sure a score is, whether two differ, and what GLUE reports beside accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CORRECT = "correct"


@dataclass(frozen=True)
class Score:
    """Per-example results, in the order of the examples, so that two models can be compared on
    the same ones."""

    correct: tuple[bool, ...]
    said: tuple[str | None, ...] = ()
    """What was generated, or the class that was chosen; None where options were scored. Empty if
    nothing was said."""
    unanswered: int | None = None
    """Generated texts in which no answer was found; they are wrong. None if nothing was
    generated."""

    @property
    def n(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval (Wilson 1927): sane at 0 and 1, unlike the normal one."""
        return wilson(sum(self.correct), self.n)

    @property
    def marks(self) -> str:
        """1 for every example that is right, 0 for one that is wrong."""
        return "".join("01"[right] for right in self.correct)

    @classmethod
    def of_marks(cls, marks: str) -> Score:
        return cls(tuple(mark == "1" for mark in marks))

    def as_dict(self) -> dict[str, Any]:
        found = {
            "accuracy": self.accuracy,
            "accuracy_n": self.n,
            "accuracy_interval": list(self.interval),
        }
        return found if self.unanswered is None else {**found, "unanswered": self.unanswered}

    def kept(self) -> dict[str, Any]:
        """What files keep of it: enough to hold it against another's on the same examples."""
        return {**self.as_dict(), CORRECT: self.marks}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.1%} [{low:.1%}, {high:.1%}] of {self.n}"


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval for a proportion of `right` in `n`; both bounds lie in [0, 1]."""
    p = right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def difference(mine: Score, theirs: Score) -> tuple[float, tuple[float, float]]:
    """mine - theirs in accuracy on the same examples, with its 95 % interval."""
    pairs = list(zip(mine.correct, theirs.correct, strict=True))
    won, lost = pairs.count((True, False)), pairs.count((False, True))
    return (won - lost) / len(pairs), paired(won, lost, len(pairs))


def paired(won: int, lost: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval for the difference of two proportions in `n` pairs, of which one alone was right in
    `won` and the other alone in `lost` (McNemar 1947: the others tell nothing). The normal one with
    half a pair more of each of the four kinds (Agresti & Min 2005), so that no difference in a few
    pairs is not taken for certainty; both bounds lie in [-1, 1]."""
    n += 2
    centre = (won - lost) / n
    half = z / n * math.sqrt(won + lost + 1 - (won - lost) ** 2 / n)
    return max(-1.0, centre - half), min(1.0, centre + half)


Numbers = Sequence[float] | np.ndarray


def confusion(classes: Sequence[str], expected: Sequence[str], said: Sequence[str]) -> np.ndarray:
    """(classes, classes) counts: rows what is so, columns what was said."""
    number = {name: place for place, name in enumerate(classes)}
    table = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for row, column in zip(expected, said, strict=True):
        table[number[row], number[column]] += 1
    return table


def pearson(expected: Numbers, said: Numbers) -> float:
    """Correlation, in [-1, 1]; 0 where either is always the same."""
    if np.ptp(expected) == 0 or np.ptp(said) == 0:
        return 0.0
    return float(np.corrcoef(expected, said)[0, 1])


def spearman(expected: Numbers, said: Numbers) -> float:
    """Correlation of the ranks, those of equal ones their mean."""
    return pearson(_ranks(expected), _ranks(said))


def _ranks(values: Numbers) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def matthews(table: np.ndarray) -> float:
    """Correlation of what is so with what was said, in [-1, 1], of any number of classes
    (Gorodkin 2004); 0 where either is always the same, as in scikit-learn."""
    true, said, n = table.sum(1).astype(float), table.sum(0).astype(float), float(table.sum())
    spread = (n * n - true @ true) * (n * n - said @ said)
    if spread == 0:
        return 0.0
    return float((np.trace(table) * n - true @ said) / np.sqrt(spread))


def f1(table: np.ndarray) -> list[float]:
    """Of every class: 2 · right / (said + true), 0 of one that neither is nor was said. GLUE's is
    that of the positive class."""
    both = table.sum(0) + table.sum(1)
    return [float(2 * right / total) if total else 0.0
            for right, total in zip(np.diag(table), both, strict=True)]  # fmt: skip
