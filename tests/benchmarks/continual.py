"""O-LoRA against plain sequential LoRA on SmolLM2: five tasks, two orders, the same steps.

    python -m tests.benchmarks.continual DATA RUNS [--save]

DATA holds NAME.train.jsonl and NAME.test.jsonl; the runs are written below RUNS and resumed from
there, so the hour that they take may be interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from elastic import TrainConfig, train
from elastic.config.parsing import parse
from tests.benchmarks.common import report

ORDERS = (
    "[agnews, amazon, dbpedia, yelp, sst2]",
    "[sst2, dbpedia, amazon, agnews, yelp]",
)


def settings(data: Path, run: Path, method: str, order: str) -> TrainConfig:
    return parse(TrainConfig, [
        "--config", "continual-smollm2-train", "--run", str(run), "--adapter.method", method,
        "--tasks", order,
        "--task.train", f"{data}/{{task}}.train.jsonl",
        "--task.test", f"{data}/{{task}}.test.jsonl",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    rows, matrices = {}, {}
    for number, order in enumerate(ORDERS, 1):
        for method in ("lora", "olora"):
            run = given.runs / f"{method}-{number}"
            found = train(settings(given.data, run, method, order))
            name = f"order {number}, {method}"
            rows[name] = {
                "average": found.average,
                "backward transfer": found.backward_transfer,
                "forgetting": found.forgetting,
            }
            matrices[name] = found.as_dict()
    config = settings(given.data, Path("x"), "olora", ORDERS[0])
    steps = config.task.train_examples // (config.batch_size * config.accumulation)
    report(
        "continual",
        f"five tasks in a row, SmolLM2-135M, {steps} steps of {config.batch_size} per task, rank "
        f"{config.adapter.rank}, {config.task.test_examples} test examples per task",
        rows,
        save=given.save,
        command="python -m tests.benchmarks.continual DATA RUNS",
        orders=ORDERS,
        matrices=matrices,
    )


if __name__ == "__main__":
    main()
