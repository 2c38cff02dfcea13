"""What every ingredient of training buys, at full size and cut, on SmolLM2.

    python -m tests.benchmarks.quality DATA RUNS [--task agnews] [--variants plain staged ...]
        [--seeds 0] [--split validation] [--examples 400] [--save]

Every variant takes the same 252 steps of 16 sequences (sandwich steps visit three sub-adapters) and
is scored on the same examples at uniform widths, rank at its maximum: variants are compared on
validation examples, what was chosen is reported on test examples that had no part in it. `plain` is
LoRA at full size alone, cut afterwards in the same order of channels: the baseline that elastic
training has to beat.
Runs and predictions are kept below RUNS, so hours may be interrupted.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from elastic import TrainConfig
from elastic.config.parsing import parse
from elastic.data import load_task
from elastic.evaluation.evaluate import evaluate
from elastic.evaluation.statistics import Score
from elastic.files import read_json, write_json
from elastic.run import Run
from elastic.spaces.bound import BoundSpace, SubAdapter
from elastic.supernet.store import load_run
from elastic.training.one_task import train_one
from tests.benchmarks.common import report

WIDTHS = (1.0, 0.75, 0.625, 0.5)
PLAIN = '--stages=[{"epochs": 3}]'
VARIANTS = {
    "plain": [PLAIN],
    "staged": [],
    "staged, lr 2.5e-4": ["--lr.base_lr", "2.5e-4"],
    "staged, lr 1e-3": ["--lr.base_lr", "1e-3"],
    "staged, lr 2e-3": ["--lr.base_lr", "2e-3"],
    "staged, dropout 0.1": ["--adapter.dropout", "0.1"],
    "staged, distilled": ["--distill", "0.5"],
    "staged, uniform": ["--sampling", "uniform"],
    "staged, sandwich": ["--sampling", "sandwich"],
    "staged, sandwich, distilled": ["--sampling", "sandwich", "--distill", "0.5"],
    "all at once": ['--stages=[{"epochs": 3, "train_dims": ["rank", "width"]}]'],
    "order: norm": ["--order", "norm"],
    "order: none": ["--order", "none"],
    "lonas": ["--sampling", "lonas"],
}
DATA = {  # files of training and test examples, prompt, answer
    "agnews": (
        "continual/agnews.train", "continual/agnews.test", "News: {sentence:.80}\nTopic:", "label"
    ),
    "sst2": (
        "continual/sst2.train", "continual/sst2.test", "Review: {sentence}\nSentiment:", "label"
    ),
    "math": ("math/train", "math/mawps.test", "{instruction}\nAnswer:", "answer"),
}  # fmt: skip


def settings(data: Path, run: Path, task: str, variant: str, seed: int) -> TrainConfig:
    training, test, prompt, answer = DATA[task]
    return parse(TrainConfig, [
        "--run", str(run), "--task.name", "jsonl", "--task.prompt", prompt,
        "--task.answer", answer, "--task.train", f"{data / training}.jsonl",
        "--task.test", f"{data / test}.jsonl", "--task.train_examples", "1344",
        "--task.validation_examples", "400", "--task.test_examples", "1000",
        "--space", "llama", "--save_steps", "20", "--seed", str(seed),
        "--lr.base_lr", "5e-4", "--lr.warmup_epochs", "0.1", *VARIANTS[variant],
    ])  # fmt: skip


def at_width(space: BoundSpace, width: float) -> SubAdapter:
    """Every width at this fraction, every rank at its maximum: ranks cost nothing once merged."""
    narrow, full = space.uniform(width), space.maximal()
    return SubAdapter(tuple((g.name, (full if g.dim == "rank" else narrow)[g.name]) for g in space))


def scores(run: Run, split: str, examples: int) -> dict[float, Score]:
    """Of a finished run at every width, from RUN/quality-SPLIT-N.json where it stands."""
    file = run.path / f"quality-{split}-{examples}.json"
    if not file.is_file():
        config, base, net = load_run(run)
        rows = getattr(load_task(config.task, config.seed), split)[:examples]
        found = {}
        for width in WIDTHS:
            with net.active(at_width(net.space, width)):
                found[width] = evaluate(net.model, base.tokenizer, rows, label=f"width {width}")
        write_json(file, {str(width): list(score.correct) for width, score in found.items()})
    return {float(width): Score(tuple(right)) for width, right in read_json(file).items()}


def difference(mine: Sequence[Score], theirs: Sequence[Score]) -> tuple[float, float]:
    """Mean over seeds and examples of mine - theirs, and half its 95 % interval over examples."""
    each = [
        statistics.mean(a) - statistics.mean(b)
        for a, b in zip(
            zip(*(score.correct for score in mine), strict=True),
            zip(*(score.correct for score in theirs), strict=True),
            strict=True,
        )
    ]
    return statistics.mean(each), 1.96 * statistics.stdev(each) / math.sqrt(len(each))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--task", choices=DATA, default="agnews")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    found: dict[str, dict[float, list[Score]]] = {}
    for variant in given.variants:
        each = []
        for seed in given.seeds:
            run = given.runs / given.task / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"
            trained = train_one(settings(given.data, run, given.task, variant, seed))
            each.append(scores(trained, given.split, given.examples))
        found[variant] = {width: [one[width] for one in each] for width in WIDTHS}
    rows = {}
    for variant, by_width in found.items():
        rows[variant] = {
            f"{width:g}": statistics.mean(score.accuracy for score in by_width[width])
            for width in WIDTHS
        }
        if "plain" in found:
            for width in WIDTHS:
                mean, half = difference(by_width[width], found["plain"][width])
                rows[variant] |= {f"{width:g} - plain": mean, f"± {width:g}": half}
    report(
        "quality",
        f"{given.task}, SmolLM2-135M, 252 steps of 16, n = {given.examples} of {given.split}, seeds"
        f" {given.seeds}, accuracy by uniform width, and paired differences from plain cut as much",
        rows, save=given.save, result=f"quality-{given.task}-{given.split}",
        command="python -m tests.benchmarks.quality DATA RUNS", prompt=DATA[given.task][2],
    )  # fmt: skip


if __name__ == "__main__":
    main()
