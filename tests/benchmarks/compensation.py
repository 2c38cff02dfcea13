"""What it is worth to make up for cut channels, on a finished run at uniform widths.

    python -m tests.benchmarks.compensation RUN [--examples 200] [--widths 0.75 0.625 0.5] [--save]

Every width is scored on the same test examples, ranks whole: cut alone, with half and with all of
what is lost made up for, fitted to the full model block after block on top of that, and as the
held-out examples choose. Differences are paired, in points, with half of their 95 % interval.
"""

from __future__ import annotations

import argparse
import time

from elastic.config import CompensationConfig
from elastic.data import load_task
from elastic.evaluation.evaluate import evaluate
from elastic.evaluation.statistics import Score
from elastic.run import Run
from elastic.supernet.held_out import SEQUENTIAL, Compensated, HeldOut
from elastic.supernet.store import load_run
from tests.benchmarks.common import report
from tests.benchmarks.quality import at_width, difference


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--widths", nargs="+", type=float, default=[0.75, 0.625, 0.5])
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    run = Run(given.run)
    config, base, net = load_run(run)
    task = load_task(config.task, config.seed)
    held_out = HeldOut.of(run, net, base.tokenizer, task, CompensationConfig())
    rows = task.test[: given.examples]

    def scored(sub, made_up: Compensated, label: str) -> Score:
        model = held_out.model(sub, made_up)
        return evaluate(model, base.tokenizer, rows, label=label)

    full = scored(net.space.maximal(), Compensated(), "full")
    table = {"1": {"full": full.accuracy}}
    for width in given.widths:
        sub = at_width(net.space, width)
        start = time.perf_counter()
        decided = held_out(sub)
        middle = time.perf_counter()
        chosen, _ = held_out.refined(sub, decided)
        end = time.perf_counter()
        ways = {
            "cut": Compensated(),
            "half": Compensated(0.5),
            "all": Compensated(1.0),
            SEQUENTIAL: Compensated(decided.degree, sequential=True),
        }
        scores = {name: scored(sub, way, f"{width} {name}") for name, way in ways.items()}
        exact = {(way.degree, way.sequential): scores[name] for name, way in ways.items()}
        scores["chosen"] = exact[chosen.degree, chosen.sequential]
        gain, half = difference([scores["chosen"]], [scores["cut"]])
        lost, around = difference([scores["chosen"]], [full])
        table[f"{width:g}"] = {
            **{name: score.accuracy for name, score in scores.items()},
            "chosen - cut": gain, "± of that": half, "chosen - full": lost, "± of this": around,
            **{f"loss {name}": loss for name, loss in chosen.losses.items()},
            "decided in s": middle - start, "fitted in s": end - middle,
        }  # fmt: skip
    report(
        "compensation",
        f"{config.task.name}, {config.model.path}, {given.examples} test examples, accuracy by "
        "uniform width of the MLPs",
        table, save=given.save, result=f"compensation-{config.task.name}",
        command="python -m tests.benchmarks.compensation RUN",
    )  # fmt: skip


if __name__ == "__main__":
    main()
