"""What every ingredient of training buys, at full size and cut, on SmolLM2.

    python -m tests.benchmarks.quality DATA RUNS [--task agnews] [--variants plain staged ...]
        [--seeds 0] [--split validation] [--examples 400] [--save]

Every variant takes the same 252 steps of 16 sequences (sandwich steps visit three sub-adapters) and
is scored on the same examples at uniform widths, ranks whole: cut, and with what is cut made up for
as the product does it (none, half or all of it, or fitted to the full model, as held-out examples
say). Variants are compared on validation examples, what was chosen is reported on test examples
that had no part in it.

Rivals: `plain` is LoRA at full size alone, cut afterwards in the same order of channels, with the
same compensation. `pruned` cuts the base model at once, in the order of Wanda's score summed over a
column, makes up for it, and trains a LoRA at that size with the same steps, one model after another
for every width. `recovered` trains a finished `staged` run on at every width, as
`elastic search --recover` does, for a quarter of the steps.
Runs and predictions are kept below RUNS, so hours may be interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from elastic import TrainConfig
from elastic.adapters import METHODS, Lora
from elastic.config import CompensationConfig, RecoveryConfig
from elastic.config.parsing import parse
from elastic.data import load_task
from elastic.evaluation.evaluate import evaluate
from elastic.evaluation.statistics import Score
from elastic.files import read_json, write_json
from elastic.run import Run
from elastic.spaces.bound import BoundSpace, SubAdapter
from elastic.supernet.held_out import Compensated, HeldOut
from elastic.supernet.store import MOMENTS, load_run
from elastic.training.one_task import train_one
from tests.benchmarks.common import report

WIDTHS = (1.0, 0.75, 0.625, 0.5)
STEPS = 252
PLAIN = '--stages=[{"epochs": 3}]'
FEWER = ", 128 calibrating examples"
"""Of a variant that is there already: its super-adapter, with the moments of fewer examples."""
MADE_UP_FOR, KL = ["--compensation_in_training", "1"], ["--distill", "1"]
DIAGONAL = "staged, diagonal"
VARIANTS = {
    "plain": [PLAIN],
    "staged": [],
    f"staged{FEWER}": ["--compensation_examples", "128"],
    "staged, lr 2.5e-4": ["--lr.base_lr", "2.5e-4"],
    "staged, lr 1e-3": ["--lr.base_lr", "1e-3"],
    "staged, lr 2e-3": ["--lr.base_lr", "2e-3"],
    "staged, dropout 0.1": ["--adapter.dropout", "0.1"],
    "staged, distilled": ["--distill", "0.5"],
    "staged, maximal a third": ["--maximal_every", "3"],
    "staged, ranks elastic": ["--ranks", "elastic"],
    DIAGONAL: [],
    "staged, KL alone": KL,
    "staged, half made up for": ["--compensation_in_training", "0.5"],
    "staged, all made up for": MADE_UP_FOR,
    "staged, all made up for, KL alone": [*MADE_UP_FOR, *KL],
    "staged, uniform": ["--sampling", "uniform"],
    "staged, sandwich": ["--sampling", "sandwich"],
    "staged, sandwich, distilled": ["--sampling", "sandwich", "--distill", "0.5"],
    "all at once": ['--stages=[{"epochs": 3, "train_dims": ["rank", "width"]}]'],
    "order: norm": ["--order", "norm"],
    "order: none": ["--order", "none"],
    "lonas": ["--sampling", "lonas"],
}
CUT, MADE_UP = "cut", "made up for"
DATA = {  # files of training and test examples, prompt, answer
    "agnews": (
        "continual/agnews.train", "continual/agnews.test", "News: {sentence:.80}\nTopic:", "label"
    ),
    "sst2": (
        "continual/sst2.train", "continual/sst2.test", "Review: {sentence}\nSentiment:", "label"
    ),
    "math": ("math/train", "math/mawps.test", "{instruction}\nAnswer:", "answer"),
}  # fmt: skip
Scores = Mapping[str, Mapping[float, Score]]
"""By what is done about cut channels, and width."""


def settings(data: Path, run: Path, task: str, flags: Sequence[str], seed: int) -> TrainConfig:
    training, test, prompt, answer = DATA[task]
    return parse(TrainConfig, [
        "--run", str(run), "--task.name", "jsonl", "--task.prompt", prompt,
        "--task.answer", answer, "--task.train", f"{data / training}.jsonl",
        "--task.test", f"{data / test}.jsonl", "--task.train_examples", "1344",
        "--task.validation_examples", "400", "--task.test_examples", "1000",
        "--model.dtype", "float32", "--space", "llama", "--save_steps", "50", "--seed", str(seed),
        "--lr.base_lr", "5e-4", "--lr.warmup_epochs", "0.1", *flags,
    ])  # fmt: skip


def at_width(space: BoundSpace, width: float) -> SubAdapter:
    """Every width at this fraction, every rank at its maximum: ranks cost nothing once merged."""
    narrow, full = space.uniform(width), space.maximal()
    return SubAdapter(tuple((g.name, (full if g.dim == "rank" else narrow)[g.name]) for g in space))


def scores(run: Run, split: str, examples: int) -> Scores:
    """Of a finished run at every width, from RUN/quality-SPLIT-N.json where it stands."""
    file = run.path / f"quality-{split}-{examples}.json"
    found: dict[str, dict[str, list[bool]]] = read_json(file) if file.is_file() else {}
    missing = [width for width in WIDTHS if str(width) not in found.get(MADE_UP, {})]
    if missing:
        config, base, net = load_run(run)
        task = load_task(config.task, config.seed)
        rows = getattr(task, split)[:examples]
        held_out = HeldOut.of(run, net, base.tokenizer, task, CompensationConfig())
        for width in missing:
            sub = at_width(net.space, width)
            made_up, model = held_out.refined(sub, held_out(sub))
            print(f"{run.path}, width {width}: {made_up}", flush=True)
            models = {MADE_UP: model}
            if made_up != Compensated():
                models[CUT] = held_out.model(sub, Compensated())
            for way, each in models.items():
                score = evaluate(each, base.tokenizer, rows, label=f"width {width} {way}")
                found.setdefault(way, {})[str(width)] = list(score.correct)
            found.setdefault(CUT, {}).setdefault(str(width), found[MADE_UP][str(width)])
            write_json(file, found)
    return {
        way: {float(width): Score(tuple(right)) for width, right in by_width.items()}
        for way, by_width in found.items()
    }


class Diagonal(Lora):
    """As MatryoshkaLoRA trains (Modoranu et al. 2026, arXiv 2605.07850): between A and B stands a
    fixed diagonal, for every rank the share of a quarter, a half, three quarters and all of the
    ranks that it belongs to."""

    def unscaled(self, rank: int) -> tuple[Tensor, Tensor]:
        A, B = super().unscaled(rank)
        quarter = torch.arange(rank, device=A.device) * 4 // self.max_rank
        return A * (1 - quarter / 4).to(A.dtype)[:, None], B


def trained(data: Path, runs: Path, task: str, variant: str, seed: int) -> Run:
    name = variant.replace(": ", "-").replace(", ", "-").replace(" ", "-")
    config = settings(data, runs / task / f"{name}-{seed}", task, VARIANTS[variant], seed)
    if variant.endswith(FEWER) and not Path(config.run).exists():
        run, other = Run(config.run), trained(data, runs, task, variant.removesuffix(FEWER), seed)
        run.begin(config)
        shutil.copytree(
            other.super_adapter, run.super_adapter, ignore=shutil.ignore_patterns(MOMENTS)
        )
    return train_one(config)


def pruned(data: Path, runs: Path, task: str, seed: int) -> Iterator[tuple[float, Run]]:
    """The base model with an update of nothing, cut, made up for, then trained, by width."""
    nothing = ["--max_steps", "1", "--lr.base_lr", "1e-12", "--probe_steps", "0"]
    base = train_one(settings(data, runs / task / f"base-{seed}", task, nothing, seed))
    yield from trained_on(data, runs, task, seed, base, "pruned", [PLAIN])


def recovered(data: Path, runs: Path, task: str, seed: int) -> Iterator[tuple[float, Run]]:
    """The sub-adapters of a finished run, each trained on as `--recover` does, by width."""
    steps = str(STEPS // 4)
    flags = ["--max_steps", steps, f'--stages=[{{"epochs": {steps}}}]', "--lr.base_lr", "2.5e-4",
             "--lr.warmup_epochs", "0", "--distill", str(RecoveryConfig().distill)]  # fmt: skip
    staged = trained(data, runs, task, "staged", seed)
    yield from trained_on(data, runs, task, seed, staged, "recovered", flags)


def trained_on(
    data: Path, runs: Path, task: str, seed: int, base: Run, name: str, flags: Sequence[str]
) -> Iterator[tuple[float, Run]]:
    space = load_run(base)[2].space
    for width in WIDTHS[1:]:
        file = base.path / f"{width}.json"
        write_json(file, at_width(space, width).as_dict())
        alone = ["--start_from", str(base.path), "--sub_adapter", str(file), *flags]
        run = runs / task / f"{name}-{width}-{seed}"
        yield width, train_one(settings(data, run, task, alone, seed))


def scores_one_by_one(
    found: Iterator[tuple[float, Run]], split: str, examples: int
) -> dict[float, Score]:
    """Of runs that trained one sub-adapter each, with as much made up for as they did with."""
    scores = {}
    for width, run in found:
        file = run.path / f"quality-{split}-{examples}.json"
        if not file.is_file():
            config, base, net = load_run(run)
            rows = getattr(load_task(config.task, config.seed), split)[:examples]
            chosen = run.chosen("best")
            degree = Compensated.of(chosen.compensation).degree
            with net.active(chosen.at(net.space), degree) as model:
                score = evaluate(model, base.tokenizer, rows, label=run.path.name)
            write_json(file, list(score.correct))
        scores[width] = Score(tuple(read_json(file)))
    return scores


RIVALS = {"pruned": pruned, "recovered": recovered}
"""A model for every width."""


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
    names = [*VARIANTS, *RIVALS]
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--task", choices=DATA, default="agnews")
    parser.add_argument("--variants", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    found: dict[str, list[Scores]] = {}
    for variant in given.variants:
        for seed in given.seeds:
            where = (given.data, given.runs, given.task)
            of_whom = (given.split, given.examples)
            if variant in RIVALS:
                each = {MADE_UP: scores_one_by_one(RIVALS[variant](*where, seed), *of_whom)}
            else:
                method = Diagonal if variant == DIAGONAL else Lora
                with patch.dict(METHODS, lora=method):
                    each = scores(trained(*where, variant, seed), *of_whom)
            found.setdefault(variant, []).append(each)
    table = {}
    for variant, seeds in found.items():
        for way in seeds[0]:
            mine = {width: [one[way][width] for one in seeds] for width in seeds[0][way]}
            table[f"{variant}, {way}"] = row = {
                f"{width:g}": statistics.mean(score.accuracy for score in of_width)
                for width, of_width in mine.items()
            }
            others = {"first": found[given.variants[0]], "full": seeds}
            for (width, of_width), (other, theirs) in itertools.product(
                mine.items(), others.items()
            ):
                at = 1.0 if other == "full" else width
                compared = [one[MADE_UP][at] for one in theirs if at in one[MADE_UP]]
                if compared:
                    mean, half = difference(of_width, compared)
                    row |= {f"{width:g} - {other}": mean, f"± {width:g} - {other}": half}
    report(
        "quality",
        f"{given.task}, SmolLM2-135M, {STEPS} steps of 16, n = {given.examples} of {given.split}, "
        f"seeds {given.seeds}, accuracy by uniform width, and paired differences, with what is cut "
        f"made up for, from {given.variants[0]} cut as much (first) and from its own full size",
        table, save=given.save, result=f"compensated-{given.task}-{given.split}",
        command="python -m tests.benchmarks.quality DATA RUNS", prompt=DATA[given.task][2],
    )  # fmt: skip


if __name__ == "__main__":
    main()
