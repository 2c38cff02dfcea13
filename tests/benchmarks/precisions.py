"""A front that mixes sizes and precisions, on a real model.

    python -m tests.benchmarks.precisions RUN STUDY [--runtime openvino] [--modes int8 int4]
        [--trials 50] [--save]

RUN is a trained run, which STUDY becomes a copy of (kept, so that an interrupted search goes on).
The search trades accuracy on validation examples against time per token; its front is scored on
test examples with rounded weights, and its graphs are compressed and timed, predicted and measured
figures side by side.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from elastic.config import SearchConfig, TimingConfig
from elastic.run import Run
from elastic.searching.study import search
from tests.benchmarks.common import report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("study", type=Path)
    parser.add_argument("--runtime", choices=("onnx", "openvino"), default="openvino")
    parser.add_argument("--modes", nargs="+", default=["int8", "int4"])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    if not given.study.is_dir():
        shutil.copytree(given.run, given.study, ignore=shutil.ignore_patterns("search", "export"))
    run, timing = Run(given.study), TimingConfig(runtime=given.runtime, new_tokens=6)
    front = search(
        SearchConfig(
            run=str(run.path), compress=given.modes, timing=timing, trials=given.trials,
            objectives=["accuracy", "decode_ms"],
        )
    )  # fmt: skip
    front.show()
    rows, full = {}, front.full
    for member in front.members:
        figures, measured = member.figures, member.measured
        rows[f"{member.name}, {front.weights(member)}"] = {
            **member.test, "params": figures.params / full.params,
            "memory": figures.memory_mb / full.memory_mb,
            "prefill": measured.prefill_ms / full.prefill_ms,
            "decode": measured.decode_ms / full.decode_ms,
            "predicted decode": figures.decode_ms / full.decode_ms, "control": measured.control,
        }  # fmt: skip
    errors = {
        mode or "float32": {name: error.mean for name, error in table.errors.items()}
        for mode, table in front.timetables.items()
    }
    n = front.members[0].test["accuracy_n"]
    report(
        "precisions",
        f"{given.study.name} in {given.runtime}, {given.trials} evaluations: accuracy on n = {n} "
        "test examples; latency in parts of the full model's in float32, in turns with it",
        rows, save=given.save, command="python -m tests.benchmarks.precisions RUN STUDY",
        table_errors=errors,
    )  # fmt: skip


if __name__ == "__main__":
    main()
