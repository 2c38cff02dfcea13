"""Whether gradients know which groups matter: importances against what cutting each alone costs.

    python -m tests.benchmarks.importances RUN [--examples 96] [--save]

Truth: the loss on validation examples with one group at its smallest choice, all others full, less
the full model's. Importances: `elastic.supernet.group_importance` on 64 training examples, as
the search uses them. Rank correlations within a kind of group, since that is what the search
compares.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch

from elastic.config import SearchConfig
from elastic.console import track
from elastic.data import load_task
from elastic.data.answers import answer_logits, answer_loss
from elastic.data.collating import collated
from elastic.data.encoding import encode_all
from elastic.latency.cost_table import kinds
from elastic.latency.latency_table import spearman
from elastic.run import Run
from elastic.searching.study import IMPORTANCE_BATCH
from elastic.supernet.group_importance import group_importance
from elastic.supernet.store import load_run
from tests.benchmarks.common import report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--examples", type=int, default=96)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    config, base, net = load_run(Run(given.run))
    task, pad = load_task(config.task, config.seed), base.tokenizer.pad_token_id

    def batches(examples, size):
        return list(
            collated(encode_all(base.tokenizer, examples, base.model), size, pad, net.model.device)
        )

    asked = task.train[: SearchConfig().importance_examples]
    found = group_importance(net, batches(asked, IMPORTANCE_BATCH))
    validation = batches(task.validation[: given.examples], 32)

    @torch.inference_mode()
    def loss(sub) -> float:
        with net.active(sub):
            return sum(
                float(answer_loss(*answer_logits(net.model, batch))) for batch in validation
            ) / len(task.validation[: given.examples])

    full, space = loss(net.space.maximal()), net.space
    at = space.indices(space.maximal())
    lost = {
        group.name: loss(space.at({**at, group.name: len(group.choices) - 1})) - full
        for group in track(list(space), "cutting each group alone")
    }
    rows = {}
    for kind in dict.fromkeys(kinds(space)):
        names = [g.name for g, own in zip(space, kinds(space), strict=True) if own == kind]
        truth = np.array([lost[name] for name in names])
        guess = np.array([found[name] for name in names])
        rows[kind] = {
            "rank correlation": spearman(guess, truth),
            "groups": len(names),
            "± (standard error of none)": 1 / math.sqrt(len(names) - 1),
            "loss, mean": float(truth.mean()),
            "loss, most": float(truth.max()),
        }
    report(
        "importances",
        f"gradient importances of {len(asked)} training examples against the loss on "
        f"{given.examples} validation examples with each group alone cut to its smallest choice",
        rows, save=given.save, command="python -m tests.benchmarks.importances RUN",
        task=config.task.train or config.task.name,
    )  # fmt: skip


if __name__ == "__main__":
    main()
