"""What the stress program counts: a run that was killed beside the same one that was not."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

from elastic.files import digest
from elastic.run import Run
from tests.helpers.tiny_runs import logged
from tests.programs.stress_place import TOLD, Place


def compare_files(place: Place, whole: Place, counts: Counter) -> None:
    for each in (place, whole):
        (each.folder / TOLD).unlink(missing_ok=True)
    mine, theirs = place.listing(), whole.listing()
    counts["lost"] += len(theirs - mine)
    counts["left"] += len(mine - theirs)
    for path in sorted(mine - theirs):
        print("left", path)


def compare_training(place: Place, whole: Place, counts: Counter, killed: list[int]) -> None:
    compare_files(place, whole, counts)
    steps = Counter(row["step"] for row in logged(place.run))
    wanted = {row["step"] for row in logged(whole.run)}
    counts["lost"] += len(wanted - set(steps))
    counts["doubled"] += sum(steps.values()) - len(steps)
    counts["unequal"] += logged(place.run) != logged(whole.run)
    for path in sorted(whole.run.super_adapter.iterdir()):
        counts["unequal"] += digest_of(path) != digest_of(place.run.super_adapter / path.name)


def digest_of(path: Path) -> str | None:
    return digest(path) if path.is_file() else None


def compare_search(place: Place, whole: Place, counts: Counter, killed: list[int]) -> None:
    lines = (place.folder / TOLD).read_text().splitlines()
    asked = [tuple(json.loads(line)) for line in lines]
    last = dict(asked)  # of each process, what it was at when it ended
    allowed = Counter(last[process] for process in killed if process in last)
    for candidate, times in Counter(candidate for _, candidate in asked).items():
        counts["doubled"] += max(0, times - 1 - allowed[candidate])
    compare_files(place, whole, counts)
    mine, theirs = (rows_of(each.run) for each in (place, whole))
    counts["lost"] += len(theirs.keys() - mine.keys())
    trials = (place.run.search / "trials.csv").read_text().splitlines()[1:]
    counts["doubled"] += len(trials) - len(mine)
    counts["unequal"] += mine != theirs
    fronts = [front_of(each.run) for each in (place, whole)]
    counts["unequal"] += fronts[0] != fronts[1]


def rows_of(run: Run) -> dict[str, list[str]]:
    """Figures by sub-adapter, without what is believed of them, which their order rounds."""
    rows = csv.DictReader((run.search / "trials.csv").read_text().splitlines())
    return {
        row["sub_adapter"]: [v for k, v in row.items() if k not in ("trial", "accuracy_estimate")]
        for row in rows
    }


def front_of(run: Run) -> list[dict[str, Any]]:
    left_out = ("validation_estimate",)
    rows = json.loads(run.front.read_text())
    return [{k: v for k, v in row.items() if k not in left_out} for row in rows]


def compare_export(place: Place, whole: Place, counts: Counter, killed: list[int]) -> None:
    compare_files(place, whole, counts)
    told = ("report.json", "report.md", "README.md")  # with times
    for path in sorted(whole.run.exports.rglob("*")):
        if path.is_file() and path.name not in told:
            other = place.folder / path.relative_to(whole.folder)
            same = digest_of(path) == digest_of(other)
            counts["unequal"] += not same
            if not same:
                print("unequal", path)
