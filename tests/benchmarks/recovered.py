"""How often the order of finalists changes when they are trained on, and what that gains.

    python -m tests.benchmarks.recovered RUN [RUN ...] [--save]

Every RUN was searched with `--recover STEPS`; its front.json keeps the scores of all finalists
before and after. Two finalists change places if one answers more test examples before, and the
other one after. A search ranks by validation examples, so the best of the front is chosen by those,
before as after. Gains are in points on the same test examples, with their 95 % interval. Beside
them stands what as many steps gave the maximal sub-adapter, on labels alone.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic.evaluation.statistics import CORRECT, Score, difference
from elastic.files import read_json
from elastic.run import Run
from tests.benchmarks.common import report

Scores = Mapping[str, Any]
"""Of one sub-adapter: accuracy, validation_accuracy, and which test examples were right."""


def changed_places(before: Sequence[float], after: Sequence[float]) -> tuple[int, int]:
    """How many pairs change places, and how many there are; ties are no change."""
    pairs = list(itertools.combinations(range(len(before)), 2))
    swapped = sum((before[a] - before[b]) * (after[a] - after[b]) < 0 for a, b in pairs)
    return swapped, len(pairs)


def gain(before: Scores, after: Scores) -> dict[str, float]:
    """Points from one to the other on the same test examples."""
    points, (low, high) = difference(*(Score.of_marks(s[CORRECT]) for s in (after, before)))
    return {"gain": 100 * points, "low": 100 * low, "high": 100 * high}


def row_of(front: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What recovery changed in one front, cheapest first."""
    recoveries = [member["recovery"] for member in front]
    before = [one["before"] for one in recoveries]
    after = [one["after"] if one["taken"] else one["before"] for one in recoveries]
    swapped, pairs = changed_places(*([s["accuracy"] for s in side] for side in (before, after)))
    first, now = (
        max(range(len(front)), key=lambda i, side=side: (side[i]["validation_accuracy"], -i))
        for side in (before, after)
    )
    maximal = recoveries[0]["maximal"]
    return {
        "steps": recoveries[0]["steps"], "finalists": len(front),
        "taken": sum(one["taken"] for one in recoveries),
        "pairs": pairs, "changed places": swapped, "another best": first != now,
        "best before": 100 * before[first]["accuracy"], "best after": 100 * after[now]["accuracy"],
        **gain(before[first], after[now]),
        "n": len(before[first][CORRECT]),
        "mean gain": sum(gain(*pair)["gain"] for pair in zip(before, after, strict=True))
        / len(front),
        "maximal": gain(maximal["before"], maximal["after"])["gain"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    rows = {path.name: row_of(read_json(Run(path).search / "front.json")) for path in given.runs}
    report(
        "recovered",
        "SmolLM2-135M, finalists of a search before and after recovery; accuracies and gains in "
        "points of the test examples",
        rows, save=given.save, command="python -m tests.benchmarks.recovered RUN ...",
    )  # fmt: skip


if __name__ == "__main__":
    main()
