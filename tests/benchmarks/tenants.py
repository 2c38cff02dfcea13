"""Super-adapters of several tasks on one base in memory: what going from one to another costs.

    python -m tests.benchmarks.tenants FOLDER FOLDER [...] [--turns 20] [--save]

Folders are those of `elastic export --formats elastic --slices.base reference`. Timed are a change
of size within a task, and from one task to the next, each at its smallest size; counted is the
memory of all weights, beside that of as many models loaded alone.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import elastic
from elastic.formats import slices
from elastic.formats.choosing import FULL
from tests.benchmarks.common import report


def megabytes(model) -> float:
    """Of all tensors that live in the model, those of sizes that are not active included."""
    held = [*model.parameters(), *model.buffers()]
    if hasattr(model, "shared"):
        for sizes in model.adapters.values():
            held += [p for layer in sizes.layers() for p in layer.parameters()]
    return (
        sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())
        / 1e6
    )


def milliseconds(action: Callable[[], object], turns: int) -> float:
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    folders = {f"task {number}": folder for number, folder in enumerate(given.folders, 1)}
    least = {
        task: min((about["params"], name) for name, about in slices.read(f)["slices"].items())[1]
        for task, f in folders.items()
    }
    alone = sum(megabytes(elastic.load(folder, resizable=True)) for folder in folders.values())
    start = time.perf_counter()
    model = elastic.load(folders)
    loaded = time.perf_counter() - start
    first = model.adapters["task 1"]
    sizes = itertools.cycle([least["task 1"], FULL])
    tasks = itertools.cycle(folders)
    rows = {
        "size within a task": {"ms": milliseconds(lambda: first.resize(next(sizes)), given.turns)},
        "task": {
            "ms": milliseconds(
                lambda: model.adapters[task := next(tasks)].resize(least[task]), given.turns
            )
        },
        "weights in memory": {"mb": megabytes(model), "mb alone": alone},
        "loading": {"s": loaded},
    }
    report(
        "tenants",
        f"{len(folders)} super-adapters on one base, median of {given.turns} turns",
        rows, save=given.save, command="python -m tests.benchmarks.tenants FOLDER FOLDER",
    )  # fmt: skip


if __name__ == "__main__":
    main()
