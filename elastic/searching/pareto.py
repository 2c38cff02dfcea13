"""Dominance. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def non_dominated(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of points (n, objectives) that no other dominates, every objective to be minimised.

    One of several equal points is kept. Sorted by the first objective.
    """
    if not len(points):
        return []
    values = np.asarray(points, dtype=float)
    order = np.lexsort(values.T[::-1])  # by the first objective, ties by the next
    front: list[int] = []
    for index in order:
        better = values[front]
        if not len(front) or not np.any(np.all(better <= values[index], axis=1)):
            front.append(int(index))
    return front


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Area that points (n, 2), both objectives to be minimised, dominate up to the reference."""
    front = [points[index] for index in non_dominated(points)]
    ends = [*(first for first, _ in front), reference[0]][1:]
    return float(
        sum(
            max(0.0, min(end, reference[0]) - first) * max(0.0, reference[1] - second)
            for (first, second), end in zip(front, ends, strict=True)
        )
    )


def thin(indices: Sequence[int], count: int, keep: int) -> list[int]:
    """At most `count` of a sorted front, evenly spread, with both ends and `keep` among them."""
    if len(indices) <= count:
        return list(indices)
    places = {round(i * (len(indices) - 1) / max(1, count - 1)) for i in range(count)}
    chosen = sorted(places)
    if keep not in (indices[place] for place in chosen):
        place = list(indices).index(keep)
        inner = chosen[1:-1] if len(chosen) > 2 else chosen
        chosen.remove(min(inner, key=lambda other: abs(other - place)))
        chosen = sorted([*chosen, place])
    return [indices[place] for place in chosen]
