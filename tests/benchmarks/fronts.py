"""On a real model: the front of fifty evaluations against the front of NSGA-II after two hundred.

    python -m tests.benchmarks.fronts RUN TABLE STUDIES [--name agnews] [--save]

RUN is a trained run, TABLE its latency table (`elastic latency RUN --save TABLE`, of any runtime),
so that latency is the same for both. `additive` begins with the ladder and chooses by its
estimates; `NSGA-II` is the published search: a population of 8, chosen by raw validation accuracy.
Both fronts, thinned to eight, are then scored on the same test examples, which neither has seen. A
figure is the hypervolume of those test accuracies, the full latency and the least test accuracy
being the reference. Studies are kept below STUDIES, so hours may be interrupted.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from elastic.config import SearchConfig, TableConfig, TimingConfig
from elastic.console import track
from elastic.data import load_task
from elastic.evaluation.evaluate import evaluate
from elastic.files import read_json, write_json
from elastic.run import Run
from elastic.searching.front import Front
from elastic.searching.pareto import hypervolume, non_dominated, thin
from elastic.searching.study import search
from elastic.supernet.compact import compact
from elastic.supernet.store import load_run
from tests.benchmarks.common import report

SEARCHES = {
    "additive, 50": {"sampler": "additive", "trials": 50},
    "NSGA-II, 200": {"sampler": "nsga2", "trials": 200, "population": 8, "starts": 2},
}
MEMBERS = 8


def selected(front: Front, name: str) -> list:
    """What a user of this search would choose from."""
    raw = name.startswith("NSGA")
    points = [
        (one.figures.prefill_ms, -(one.figures.accuracy if raw else one.estimate))
        for one in front.trials
    ]
    indices = non_dominated(points)
    return [front.trials[index] for index in thin(indices, MEMBERS, keep=indices[-1])]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("table")
    parser.add_argument("studies", type=Path)
    parser.add_argument("--name", default="agnews")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    target = read_json(given.table)["target"]
    device = target["device"]
    names = ("runtime", "merged", "batch", "prompt_tokens", "new_tokens")
    timing = TimingConfig(**{name: target[name] for name in names})
    found = {}
    for name, settings in SEARCHES.items():
        file = given.studies / f"{given.name}-{settings['sampler']}.json"
        if not file.is_file():
            copy = Run(given.studies / f"{given.name}-{settings['sampler']}")
            if not copy.path.is_dir():
                shutil.copytree(given.run, copy.path, ignore=shutil.ignore_patterns("search"))
            config = SearchConfig(
                run=str(copy.path), objectives=["accuracy", "prefill_ms"], test_front=1,
                table=TableConfig(file=[given.table], target=device), timing=timing, **settings,
            )  # fmt: skip
            front = search(config)
            trained, base, net = load_run(copy)
            test = load_task(trained.task, trained.seed).test
            rows = []
            for one in track(selected(front, name), "test split"):
                score = evaluate(compact(net, one.sub_adapter), base.tokenizer, test, quiet=True)
                rows.append({"prefill_ms": one.figures.prefill_ms, **score.as_dict()})
            write_json(file, {"full_ms": front.full.prefill_ms, "members": rows})
        found[name] = read_json(file)
    least = min(row["accuracy"] for each in found.values() for row in each["members"])
    rows = {}
    for name, each in found.items():
        members, full = each["members"], each["full_ms"]
        points = [(row["prefill_ms"], -row["accuracy"]) for row in members]
        rows[name] = {
            "hypervolume": hypervolume(points, (1.0001 * full, -least + 1e-9)),
            "members": len(members),
            "from_ms": min(row["prefill_ms"] for row in members),
            "most accurate": max(row["accuracy"] for row in members),
            "least accurate": min(row["accuracy"] for row in members),
            "front": [[row["prefill_ms"], row["accuracy"]] for row in members],
        }
    ours, theirs = (row["hypervolume"] for row in rows.values())
    rows["ratio"] = {"hypervolume": ours / theirs if theirs else float("inf")}
    n = next(iter(found.values()))["members"][0]["accuracy_n"]
    report(
        "fronts",
        f"{given.name}, SmolLM2-135M: hypervolume (ms times share of {n} test examples)",
        rows, save=given.save, result=f"fronts-{given.name}",
        command="python -m tests.benchmarks.fronts RUN TABLE STUDIES",
    )  # fmt: skip


if __name__ == "__main__":
    main()
