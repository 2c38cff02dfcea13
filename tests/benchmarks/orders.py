"""Which channels to keep when what is cut is made up for: our order against two that know of it.

    python -m tests.benchmarks.orders RUN [--examples 400] [--save]

On a finished run of a Llama-like model, MLPs at uniform widths, ranks whole, all of what is cut
made up for. `activation` is the order of the run. `pivoted` keeps the channel next that the kept
ones predict worst, weighed by its column (pivoted Cholesky of the second moment). `greedy` drops
the channel next whose loss costs the outputs least once the others make up for it (optimal brain
surgeon, Hassibi and Stork 1993, for whole columns). All are orders: a smaller width keeps a part of
what a larger one does. Differences from `activation` are paired, on validation examples.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from elastic.console import track
from elastic.data import load_task
from elastic.evaluation.evaluate import evaluate
from elastic.run import Run
from elastic.supernet.compact import compact
from elastic.supernet.compensation import solution
from elastic.supernet.store import load_run
from tests.benchmarks.common import report
from tests.benchmarks.quality import WIDTHS, at_width, difference

RIDGE = 0.01


def pivoted(moment: Tensor, weight: Tensor) -> list[int]:
    left, weighed = moment.clone(), weight.square().sum(0)
    order: list[int] = []
    for _ in range(round(max(WIDTHS[1:]) * len(left))):
        score = left.diagonal() * weighed
        score[order] = -torch.inf
        pivot = int(score.argmax())
        order.append(pivot)
        column = left[:, pivot] / left[pivot, pivot].clamp(min=1e-30).sqrt()
        left.addr_(column, column, alpha=-1)
    return order + sorted(set(range(len(left))) - set(order))


def greedy(moment: Tensor, weight: Tensor) -> list[int]:
    damped = moment + RIDGE * moment.diagonal().mean() * torch.eye(len(moment))
    inverse, weight = torch.linalg.inv(damped), weight.clone()
    dropped: list[int] = []
    for _ in range(len(moment) - round(min(WIDTHS) * len(moment))):
        cost = weight.square().sum(0) / inverse.diagonal().clamp(min=1e-30)
        cost[dropped] = torch.inf
        worst = int(cost.argmin())
        dropped.append(worst)
        row = inverse[worst] / inverse[worst, worst]
        weight.addr_(weight[:, worst].clone(), row, alpha=-1)
        inverse.addr_(inverse[:, worst].clone(), row, alpha=-1)
    return sorted(set(range(len(moment))) - set(dropped)) + dropped[::-1]


ORDERS = {"pivoted": pivoted, "greedy": greedy}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    run = Run(given.run)
    config, base, net = load_run(run)
    rows = load_task(config.task, config.seed).validation[: given.examples]
    moments = net.compensation.moments
    full = compact(net, net.space.maximal())
    orders: dict[str, dict[str, list[int]]] = {"activation": {}, **{name: {} for name in ORDERS}}
    for site in track(list(moments), "orders"):
        moment, weight = moments[site], full.get_submodule(site).weight
        orders["activation"][site] = list(range(len(moment)))
        for name, order in ORDERS.items():
            orders[name][site] = order(moment, weight)
    table = {}
    for width in WIDTHS[1:]:
        sub, scores = at_width(net.space, width), {}
        for name, by_site in orders.items():
            small = compact(net, sub)
            for site, order in by_site.items():
                mlp = site.rpartition(".")[0]
                kept = small.get_submodule(site).in_features
                moment, weight = moments[site][order][:, order], full.get_submodule(site).weight
                solved = solution(moment, ((0, kept),), RIDGE).to(weight)  # (cut, kept)
                ordered = weight[:, order]
                wanted = ordered[:, :kept] + ordered[:, kept:] @ solved
                small.get_submodule(site).weight = nn.Parameter(wanted.contiguous())
                for part in ("gate_proj", "up_proj"):
                    rows_of = full.get_submodule(f"{mlp}.{part}").weight[order[:kept]]
                    small.get_submodule(f"{mlp}.{part}").weight = nn.Parameter(rows_of.contiguous())
            scores[name] = evaluate(small, base.tokenizer, rows, label=f"{width} {name}")
        row = {name: score.accuracy for name, score in scores.items()}
        for name in ORDERS:
            gain, half = difference([scores[name]], [scores["activation"]])
            row |= {f"{name} - activation": gain, f"± {name}": half}
        table[f"{width:g}"] = row
        print(width, row, flush=True)
    report(
        "orders",
        f"{config.task.name}, {config.model.path}, n = {given.examples} of validation, accuracy by "
        "uniform width, all of what is cut made up for",
        table, save=given.save, command="python -m tests.benchmarks.orders RUN",
    )  # fmt: skip


if __name__ == "__main__":
    main()
