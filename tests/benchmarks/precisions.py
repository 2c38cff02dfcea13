"""A front that mixes sizes and precisions, beside the full model merely compressed.

    python -m tests.benchmarks.precisions RUN STUDY [--runtime openvino] [--modes int8 int4]
        [--trials 50] [--save]

RUN is a trained run, which STUDY becomes a copy of (kept, so that an interrupted search goes on).
The search trades accuracy on validation examples against time per token; its front is scored on
test examples with rounded weights, and its graphs are compressed and timed, predicted and measured
figures side by side. `full` is the maximal sub-adapter, in every precision.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from elastic.bench import CANDIDATE, Bench
from elastic.evaluate import evaluate
from elastic.files import read_json, write_json
from elastic.merging import compact
from elastic.rounding import round_
from elastic.run import Run
from elastic.search_config import SearchConfig, TimingConfig
from elastic.study import search
from elastic.tasks import load_task
from tests.benchmarks.common import report


def whole(run: Run, timing: TimingConfig, modes: list[str | None]) -> dict[str, dict]:
    """The maximal sub-adapter as it is and compressed, from STUDY/whole.json where it stands."""
    file = run.path / "whole.json"
    if file.is_file():
        return read_json(file)
    trained, base, net = run.load()
    test, maximal, found = load_task(trained.task, trained.seed).test, net.space.maximal(), {}
    with Bench(net, timing) as bench:
        for mode in modes:
            measured = bench(maximal, mode)
            model = compact(net, maximal)
            model = round_(model, mode, timing.runtime) if mode else model
            score = evaluate(model, base.tokenizer, test, label=mode or "as it is")
            found[f"full, {mode or 'float32'}"] = {
                **score.as_dict(), "memory_mb": bench.memory_mb(maximal, mode),
                "prefill": measured.ratio(CANDIDATE).prefill_ms,
                "decode": measured.ratio(CANDIDATE).decode_ms, "control": measured.control,
            }  # fmt: skip
    write_json(file, found)
    return found


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
    rows = whole(run, timing, [None, *given.modes])
    full = front.full
    for member in front.members:
        figures, measured = member.figures, member.measured
        rows[f"{member.name}, {front.weights(member)}"] = {
            **member.test, "memory_mb": figures.memory_mb, "params": figures.params / full.params,
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
        f"{given.run.name} in {given.runtime}, {given.trials} evaluations: accuracy on n = {n} "
        "test examples; latency in parts of the full model's in float32, in turns with it",
        rows, save=given.save, command="python -m tests.benchmarks.precisions RUN STUDY",
        table_errors=errors,
    )  # fmt: skip


if __name__ == "__main__":
    main()
