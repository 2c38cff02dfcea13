"""What a search is let loose on: a space, a table of costs, two measures, and a meter.

An accuracy is of many examples, a divergence from the full model of few rows; the meter counts
examples scored, so that a cheap measure costs what it costs. What was asked once in a search is
free the second time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from elastic.latency.cost_table import Table
from elastic.searching.pareto import non_dominated
from elastic.spaces.bound import BoundSpace

Row = tuple[int, ...]
"""Indices into each group's choices."""


class Spent(Exception):
    """The examples of a search have been scored."""


class World(ABC):
    """One space under one meter; `begin` a search before it asks."""

    space: BoundSpace
    table: Table
    examples: int
    """That one accuracy is of."""
    rows: int
    """That one divergence is of, unless it is asked for others."""
    most_rows: int
    """That there are."""
    passes: int = 1
    """Over its rows that a divergence takes."""
    gradients: int = 0
    """Examples scored, in effect, for the importances."""
    members: int = 8
    """Of a front that is selected."""

    def __init__(self) -> None:
        self.kept: dict = {}
        """What searches that can go on leave for a larger budget."""
        self.begin(0)

    def begin(self, budget: float) -> None:
        """Reset the meter; `budget` is in examples."""
        self.budget, self.spent = budget, 0.0
        self._asked: dict[tuple, float] = {}

    def pay(self, examples: float) -> None:
        if self.spent + examples > self.budget:
            raise Spent
        self.spent += examples

    @property
    def left(self) -> float:
        return self.budget - self.spent

    def accuracy(self, at: Iterable[int]) -> float:
        """Share of `examples` that are right."""
        row = tuple(map(int, at))
        if row not in self._asked:
            self.pay(self.examples)
            self._asked[row] = self.scored(row)
        return self._asked[row]

    def divergence(self, at: Iterable[int], rows: int | None = None, draw: int = 0) -> float:
        """From the full model, on so many rows; another `draw` takes other rows."""
        row, rows = tuple(map(int, at)), min(rows or self.rows, self.most_rows)
        key = (row, rows, draw)
        if key not in self._asked:
            self.pay(rows * self.passes)
            self._asked[key] = self.diverged(row, rows, draw)
        return self._asked[key]

    def importances(self) -> Mapping[str, float]:
        """Of groups, by gradients."""
        if ("importances",) not in self._asked:
            self.pay(self.gradients)
            self._asked["importances",] = 0.0
        return self.importance()

    @abstractmethod
    def scored(self, row: Row) -> float:
        """An accuracy, measured."""

    @abstractmethod
    def diverged(self, row: Row, rows: int, draw: int) -> float:
        """A divergence, measured."""

    @abstractmethod
    def importance(self) -> Mapping[str, float]:
        """Of groups, measured."""

    def cost(self, at: Iterable[int]) -> float:
        row = np.array(list(at))
        return self.table.full + float(self.table.effects[np.arange(len(row)), row].sum())

    @property
    def maximal(self) -> Row:
        return (0,) * len(self.space.groups)

    @property
    def minimal(self) -> Row:
        return tuple(len(group.choices) - 1 for group in self.space)

    def ladder(self) -> list[Row]:
        points = [self.space.maximal(), self.space.minimal(), *self.space.ladder()]
        return list(dict.fromkeys(tuple(self.space.indices(sub).values()) for sub in points))

    def budgets(self, count: int) -> list[float]:
        """Costs, evenly between the minimal one's and the full one's."""
        low, high = self.cost(self.minimal), self.cost(self.maximal)
        return [low + (high - low) * i / (count + 1) for i in range(1, count + 1)]


def selected(world: World, values: Mapping[Row, float]) -> list[Row]:
    """What a user chooses from who believes these values: the `world.members` of the front whose
    believed hypervolume is the largest. The two extremes are known to everybody, and add none."""
    rows = list(values)
    points = [(world.cost(row), -values[row]) for row in rows]
    front = non_dominated(points)
    cost, value = np.array([points[i] for i in front]).T
    end = world.cost(world.maximal)
    least = max(value.max(), -values.get(world.minimal, np.inf))
    gain = np.maximum(least - value, 0)
    # best[k][i]: of k members the cheapest of which is i, up to the full cost.
    best, chosen = gain * np.maximum(end - cost, 0), [[i] for i in range(len(front))]
    for _ in range(world.members - 1):
        after = best + gain[:, None] * np.maximum(cost - cost[:, None], 0)
        after[np.tril_indices(len(front))] = -np.inf
        following = after.argmax(1)
        more = after[np.arange(len(front)), following] > best
        chosen = [[i, *chosen[following[i]]] if more[i] else chosen[i] for i in range(len(front))]
        best = np.where(more, after.max(1), best)
    return [rows[front[i]] for i in chosen[int(best.argmax())]]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's)."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return float(np.mean(values)), float("nan")
    half = t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)
    return float(np.mean(values)), float(half)
