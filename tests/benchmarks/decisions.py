"""Who should decide how much of what is cut is made up for: rules, and what each would have chosen.

    python -m tests.benchmarks.decisions RUN [RUN ...] [--widths 0.75 0.625 0.5] [--save]

At every uniform width, ranks whole, sub-adapters are cut, with half and all made up for, and each
of those fitted to the full model: six models, scored on the test split. A rule sees the first
validation examples alone, 64 as the product does or 400. The table has the test accuracy of what
each rule chooses, first among the three that are not fitted, then among all six.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic.config import CompensationConfig
from elastic.data import load_task
from elastic.data.answers import answer_logits
from elastic.data.collating import IGNORED
from elastic.evaluation.evaluate import evaluate
from elastic.run import Run
from elastic.supernet.held_out import Compensated, HeldOut
from elastic.supernet.store import load_run
from tests.benchmarks.common import report
from tests.benchmarks.quality import at_width

SCALES = [2 ** (step / 4) for step in range(-12, 5)]
"""That logits are multiplied by, for the loss at the best temperature."""
RULES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "loss of labels, 64": lambda row: row["64"]["loss"],
    "the same at the best temperature, 64": lambda row: row["64"]["calibrated"],
    "divergence from full, 64": lambda row: row["64"]["divergence"],
    "loss of labels, 400": lambda row: row["400"]["loss"],
    "the same at the best temperature, 400": lambda row: row["400"]["calibrated"],
    "divergence from full, 400": lambda row: row["400"]["divergence"],
    "accuracy on 400": lambda row: -row["validation"],
    "always none": lambda row: row["degree"],
    "always half": lambda row: abs(row["degree"] - 0.5),
    "always all": lambda row: -row["degree"],
    "the best in hindsight": lambda row: -row["test"],
}
"""The least is chosen."""


@torch.no_grad()
def losses(model: Any, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Of labels, per answer token: as it is, and with the best one temperature for all."""
    sums, tokens = dict.fromkeys(SCALES, 0.0), 0
    for batch in batches:
        logits, labels = answer_logits(model, batch)
        logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
        tokens += len(labels)
        for scale in SCALES:
            sums[scale] += float(F.cross_entropy(scale * logits, labels, reduction="sum"))
    return {"loss": sums[1.0] / tokens, "calibrated": min(sums.values()) / tokens}


def models(run: Run, widths: Sequence[float]) -> list[dict[str, Any]]:
    """Each with its test and validation accuracy and what rules see of it."""
    config, base, net = load_run(run)
    task = load_task(config.task, config.seed)
    held_outs = {
        str(count): HeldOut.of(
            run, net, base.tokenizer, task, CompensationConfig(examples=count, room_mb=4000)
        )
        for count in (64, 400)
    }
    rows = []
    for width, degree, fitted in itertools.product(widths, (0.0, 0.5, 1.0), (False, True)):
        made_up = Compensated(degree, fitted)
        model = held_outs["64"].model(at_width(net.space, width), made_up).eval()
        scores = {
            name: evaluate(model, base.tokenizer, examples, label=f"{width} {name}").accuracy
            for name, examples in (("test", task.test), ("validation", task.validation[:400]))
        }
        seen = {
            name: {
                **losses(model, held_out.batches),
                "divergence": held_out.divergence(model),
            }
            for name, held_out in held_outs.items()
        }
        rows.append({"width": width, "degree": degree, "fitted": fitted, **scores, **seen})
    return rows


def chosen(rows: Sequence[Mapping[str, Any]], rule: str, *, fitted: bool) -> dict[str, float]:
    """Test accuracy of what a rule chooses, by width."""
    widths = dict.fromkeys(row["width"] for row in rows)
    return {
        f"{width:g}": min(
            (row for row in rows if row["width"] == width and (fitted or not row["fitted"])),
            key=RULES[rule],
        )["test"]
        for width in widths
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--widths", nargs="+", type=float, default=[0.75, 0.625, 0.5])
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    measured = {Run(path).path.name: models(Run(path), given.widths) for path in given.runs}
    show(measured, save=given.save)


def show(measured: Mapping[str, list[dict[str, Any]]], *, save: bool) -> None:
    table = {}
    for fitted, rule in itertools.product((False, True), RULES):
        row = {
            f"{name} {width}": accuracy
            for name, rows in measured.items()
            for width, accuracy in chosen(rows, rule, fitted=fitted).items()
        }
        among = "six" if fitted else "three"
        table[f"{rule}, of {among}"] = {"mean": statistics.mean(row.values()), **row}
    report(
        "decisions",
        "SmolLM2-135M, test accuracy of what each rule chooses to make up for, by run and width",
        table, save=save, command="python -m tests.benchmarks.decisions RUN ...", models=measured,
    )  # fmt: skip


if __name__ == "__main__":
    main()
