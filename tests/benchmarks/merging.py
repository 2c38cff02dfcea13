"""A SORSA-trained and an O-LoRA-trained adapter merged into a sub-adapter of SmolLM2.

    python -m tests.benchmarks.merging LONAS_RUN SORSA_RUN OLORA_SEQUENCE [--of TASK ...] [--save]

Accuracy on the test examples of each task (of the sequence's tasks, those named by --of) before and
after, for several ways to combine. Every
model answers the same examples; the sub-adapter is the best of LONAS_RUN's search.
"""

from __future__ import annotations

import argparse

from elastic import foreign, models
from elastic.config import MergeAdapterConfig, MergeConfig, TaskConfig
from elastic.continual import stage_config, stage_path
from elastic.evaluate import evaluate
from elastic.merging import combine, compact
from elastic.run import Run
from elastic.tasks import load_task
from tests.benchmarks.common import report

WAYS = {
    "merged, linear, weights 1": dict(weights=(1.0, 1.0)),
    "merged, linear, weights 0.5": dict(weights=(0.5, 0.5)),
    "merged, ties, density 0.5": dict(weights=(1.0, 1.0), strategy="ties"),
}


def tasks_of(run: Run) -> dict[str, TaskConfig]:
    """The tasks of a run or of a sequence, by name."""
    config = run.begun()
    if config.tasks:
        return {name: stage_config(config, i).task for i, name in enumerate(config.tasks)}
    return {run.path.name: config.task}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("lonas", "sorsa", "olora"):
        parser.add_argument(name)
    parser.add_argument("--of", nargs="+", default=[])
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    lonas, sorsa, sequence = Run(given.lonas), Run(given.sorsa), Run(given.olora)
    tasks = sequence.begun().tasks
    last = Run(stage_path(sequence, len(tasks) - 1, tasks[-1]))
    examples = {
        name: load_task(task, 0).test
        for run in (lonas, sorsa, sequence)
        for name, task in tasks_of(run).items()
        if run is not sequence or name in (given.of or tasks)
    }

    trained, base, net = lonas.load(dtype="float32")
    _, sub = lonas.resolve("best", net.space)
    others = [foreign.identify(str(run.path), base.digest) for run in (sorsa, last)]
    updates = [foreign.read(folder, trained.model, base.digest) for folder in others]

    def scored(model) -> dict[str, object]:
        found = {n: evaluate(model, base.tokenizer, e) for n, e in examples.items()}
        return {name: f"{s.accuracy:.1%} (n={s.n})" for name, s in found.items()}

    rows = {"sub-adapter alone": scored(compact(net, sub))}
    for name, run in (("SORSA alone, full size", sorsa), ("O-LoRA alone, full size", last)):
        rows[name] = scored(run.load(dtype="float32")[2].model)
    merges = {}
    for way, settings in WAYS.items():
        weights = settings["weights"]
        entries = [
            MergeAdapterConfig(path=str(run.path), weight=weight)
            for run, weight in zip((sorsa, last), weights, strict=True)
        ]
        strategy = settings.get("strategy", "linear")
        merged = combine(net, sub, updates, MergeConfig(adapters=entries, strategy=strategy))
        rows[way] = scored(merged.model)
        merges[way] = merged.report
    report(
        "merging",
        "test accuracy of a sub-adapter of SmolLM2-135M with other adapters folded in",
        rows,
        save=given.save,
        command="python -m tests.benchmarks.merging LONAS_RUN SORSA_RUN OLORA_SEQUENCE",
        base=models.SMOLLM2,
        merges=merges,
    )


if __name__ == "__main__":
    main()
