"""What GLUE reports of a classifier, or of a model that answers with a number, beside its accuracy
(Wang et al. 2019, arXiv 1804.07461)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def confusion(classes: Sequence[str], expected: Sequence[str], said: Sequence[str]) -> np.ndarray:
    """(classes, classes) counts: rows what is so, columns what was said."""
    number = {name: place for place, name in enumerate(classes)}
    table = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for row, column in zip(expected, said, strict=True):
        table[number[row], number[column]] += 1
    return table


def pearson(expected: Sequence[float], said: Sequence[float]) -> float:
    """Correlation, in [-1, 1]; 0 where either is always the same."""
    if np.ptp(expected) == 0 or np.ptp(said) == 0:
        return 0.0
    return float(np.corrcoef(expected, said)[0, 1])


def spearman(expected: Sequence[float], said: Sequence[float]) -> float:
    """Correlation of the ranks, those of equal ones their mean."""
    return pearson(_ranks(expected), _ranks(said))


def _ranks(values: Sequence[float]) -> np.ndarray:
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
