"""How well a latency table predicts sub-adapters that it never saw, in every runtime.

    python -m tests.benchmarks.tables RUN [--runtimes torch onnx openvino] [--save]

Nine whole models teach a table, ten others are kept from it; each is measured beside the full model
in the same rounds. On a quiet machine the full model differs from itself by less than 3 %. What is
saved of other runtimes stays.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace

from elastic.config import TableConfig, TimingConfig
from elastic.files import read_json
from elastic.latency.latency_table import record
from elastic.latency.target import Target
from elastic.run import Run
from elastic.supernet.store import load_run
from tests.benchmarks.common import RESULTS, report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--runtimes", nargs="+", default=["torch", "onnx", "openvino"])
    parser.add_argument("--unmerged", action="store_true", help="torch with unmerged factors too")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    run = Run(given.run)
    net = load_run(run)[2]
    precise = TimingConfig(rounds=9, new_tokens=6)
    kinds = {runtime: replace(precise, runtime=runtime) for runtime in given.runtimes}
    if given.unmerged:
        kinds["torch, unmerged"] = replace(precise, merged=False)
    known = read_json(RESULTS / "tables.json") if (RESULTS / "tables.json").is_file() else {}
    rows, targets = known.get("rows", {}), known.get("targets", {})
    for name, timing in kinds.items():
        target = Target.of(run, timing)
        table = record(net, target, timing, TableConfig(seen=9, unseen=10), seed=0)
        print(table.describe(), flush=True)
        targets[name] = asdict(target)
        rows[name] = {"control": table.control, "trusted": table.trusted}
        for metric, error in table.errors.items():
            rows[name] |= {
                f"{metric} full": table(net.space.maximal())[metric],
                f"{metric} least": table(net.space.minimal())[metric],
                f"{metric} error": error.mean,
                f"{metric} ranks": error.rank_correlation,
            }
        report(
            "tables",
            "latency tables of 9 whole models, mean error and rank correlation on 10 others",
            rows, save=given.save, targets=targets, command="python -m tests.benchmarks.tables RUN",
        )  # fmt: skip


if __name__ == "__main__":
    main()
