"""A SORSA-trained and an O-LoRA-trained adapter merged into a sub-adapter of SmolLM2.

    python -m tests.benchmarks.merging LONAS_RUN SORSA_RUN OLORA_RUN [--save]

Accuracy on the test examples of each run's task before and after, for several ways to combine.
Every model answers the same examples; the sub-adapter is the best of LONAS_RUN's search.
"""

from __future__ import annotations

import argparse

from elastic.config import MergeAdapterConfig, MergeConfig
from elastic.data import load_task
from elastic.evaluation.evaluate import evaluate
from elastic.exporting import foreign
from elastic.exporting.merge import combine
from elastic.models import packaged
from elastic.run import Run
from elastic.supernet.compact import compact
from elastic.supernet.store import load_run
from tests.benchmarks.common import report

WAYS = {
    "merged, linear, weights 1 and 1": dict(weights=(1.0, 1.0)),
    "merged, linear, weights 0.2 and 0.4": dict(weights=(0.2, 0.4)),
    "merged, ties, weights 0.25 and 0.6": dict(weights=(0.25, 0.6), strategy="ties"),
}
"""Weights of the SORSA and the O-LoRA adapter; the sub-adapter's own is 1."""


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("lonas", "sorsa", "olora"):
        parser.add_argument(name)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    lonas, sorsa, olora = Run(given.lonas), Run(given.sorsa), Run(given.olora)
    examples = {
        run.path.name: load_task(run.config().task, 0).test for run in (lonas, sorsa, olora)
    }

    trained, base, net = lonas.load(dtype="float32")
    _, sub = lonas.resolve("best", net.space)
    others = [foreign.identify(str(run.path), base.digest) for run in (sorsa, olora)]
    updates = [foreign.read(folder, trained.model, base.digest) for folder in others]

    def scored(model) -> dict[str, object]:
        found = {n: evaluate(model, base.tokenizer, e) for n, e in examples.items()}
        return {name: f"{s.accuracy:.1%} (n={s.n})" for name, s in found.items()}

    rows = {"sub-adapter alone": scored(compact(net, sub))}
    for name, run in (("SORSA alone, full size", sorsa), ("O-LoRA alone, full size", olora)):
        rows[name] = scored(load_run(run, dtype="float32")[2].model)
    merges = {}
    for way, settings in WAYS.items():
        weights = settings["weights"]
        entries = [
            MergeAdapterConfig(path=str(run.path), weight=weight)
            for run, weight in zip((sorsa, olora), weights, strict=True)
        ]
        strategy = settings.get("strategy", "linear")
        merging = MergeConfig(adapters=entries, strategy=strategy)
        merged, merges[way] = combine(net, sub, updates, merging)
        rows[way] = scored(merged)
    report(
        "merging",
        "test accuracy of a sub-adapter of SmolLM2-135M with other adapters folded in",
        rows,
        save=given.save,
        command="python -m tests.benchmarks.merging LONAS_RUN SORSA_RUN OLORA_RUN",
        base=packaged.SMOLLM2,
        merges=merges,
    )


if __name__ == "__main__":
    main()
