"""Trains sub-adapters on, each in a run of its own below the one it is from, and scores all of them
before and after. A finished one is found again, an interrupted one goes on."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from elastic.config import (
    ExportConfig,
    RecoveryConfig,
    ScheduleConfig,
    SearchConfig,
    StageConfig,
    TrainConfig,
)
from elastic.console import say
from elastic.data.task import Example
from elastic.errors import TrainingError
from elastic.evaluation.evaluate import evaluate
from elastic.evaluation.statistics import CORRECT, Score
from elastic.files import read_json, tag, write_json
from elastic.formats.rounding import round_
from elastic.models import loading
from elastic.run import Run, as_plain, waiting
from elastic.spaces.bound import Candidate
from elastic.supernet.examples import task_of
from elastic.supernet.held_out import Compensated, HeldOut, mean_loss
from elastic.supernet.store import load_run, read_factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CHECKPOINTS = 4
"""Of every sub-adapter that is trained on."""
MAXIMAL, SCORES = "maximal", "scores.json"


@dataclass(frozen=True)
class Asked:
    """One to train on."""

    name: str
    candidate: Candidate
    made_up: Compensated
    """As it was scored before."""
    known: Mapping[str, Any]
    """Scores from before, which need not be asked for again."""


def recover(
    run: Run, asked: Sequence[Asked], config: SearchConfig | ExportConfig
) -> list[dict[str, Any]]:
    """What became of each, as front.json has it under `recovery`: settings, scores before and
    after (mean loss of held-out answers; test accuracy with n and interval; in a search validation
    accuracy, which ranks), the same of the maximal sub-adapter after as many steps on labels alone,
    and whether the held-out loss is lower for it (`taken`). TrainingError names the one that cannot
    be trained."""
    trained = run.config()
    skeleton = loading.skeleton(trained.model)
    full = run.space().bind(skeleton, trained.adapter.rank).maximal()
    everyone = [*asked, Asked(MAXIMAL, Candidate(full), Compensated(), {})]
    with waiting(run.recovered, "recovers sub-adapters"):
        folders = [_folder(one, config) for one in everyone]
        for number, (one, folder) in enumerate(zip(everyone, folders, strict=True), 1):
            if not Run(run.recovered / folder).super_adapter.is_dir():
                say(f"Recovering {one.name} ({number} of {len(everyone)})")
                _train(one, _settings(run, trained, one, folder, config))
        *scores, maximal = _scores(run, everyone, folders, config)
        for left in run.recovered.iterdir():
            if Run(left).super_adapter.is_dir():
                Run(left).clear()
            elif left.is_dir():  # of one that failed, or was given up
                shutil.rmtree(left)
                left.with_suffix(".json").unlink(missing_ok=True)
    rate = _rate(trained, config.recover)
    settings = {**as_plain(config.recover), "base_lr": rate}
    return [
        {
            **settings,
            "folder": folder,
            "taken": after["held_out_loss"] < before["held_out_loss"],
            "before": before,
            "after": after,
            "maximal": {"before": maximal[0], "after": maximal[1]},
        }
        for folder, (before, after) in zip(folders[:-1], scores, strict=True)
    ]


def _folder(one: Asked, config: SearchConfig | ExportConfig) -> str:
    """Named after all that its weights and scores depend on."""
    settings = {
        **as_plain(config.recover),
        **as_plain(config.compensation),
        **one.candidate.as_dict(),
        "degree": one.made_up.degree,
        "runtime": config.timing.runtime,
        "maximal": one.name == MAXIMAL,
        "ranking": isinstance(config, SearchConfig),
    }
    return tag(json.dumps(settings))


def _rate(trained: TrainConfig, wanted: RecoveryConfig) -> float:
    return wanted.base_lr or trained.lr.base_lr / 2


def _settings(
    run: Run, trained: TrainConfig, one: Asked, folder: str, config: SearchConfig | ExportConfig
) -> TrainConfig:
    """Of the run in which it is trained on; nobody teaches the maximal one, which would learn
    nothing from itself."""
    wanted = config.recover
    made_up = replace(one.made_up, sequential=False, losses={})
    file = run.recovered / f"{folder}.json"
    write_json(file, {**one.candidate.as_dict(), "compensation": made_up.as_dict()})
    return replace(
        trained,
        run=str(run.recovered / folder),
        start_from=str(run.path),
        sub_adapter=str(file),
        adapter=replace(trained.adapter, taken_from=None),
        compensation_in_training=0.0,
        stages=[StageConfig(epochs=wanted.steps)],  # of at least a step each
        max_steps=wanted.steps,
        lr=ScheduleConfig(base_lr=_rate(trained, wanted)),
        distill=0.0 if one.name == MAXIMAL else wanted.distill,
        save_steps=min(trained.save_steps, max(1, wanted.steps // CHECKPOINTS)),
        tasks=[],
        report_to=[],
    )


def _train(one: Asked, config: TrainConfig) -> None:
    from elastic.training.one_task import train_one  # takes seconds, and few searches need it

    gc.collect()  # what was loaded before: this loads the base model anew
    try:
        train_one(config)
    except TrainingError as error:
        raise TrainingError(
            f"recovering {one.name}: {error}. Its rate is recover.base_lr"
        ) from None


def _scores(
    run: Run, everyone: Sequence[Asked], folders: Sequence[str], config: SearchConfig | ExportConfig
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Of each before and after, from the files that keep them where they stand."""
    files = [run.recovered / folder / SCORES for folder in folders]
    # Of an earlier version, which kept less.
    kept = {file for file in files if file.is_file() and CORRECT in read_json(file)["after"]}
    if len(kept) < len(files):
        gc.collect()
        judge = _Judge(run, config)
        for one, folder, file in zip(everyone, folders, files, strict=True):
            if file not in kept:
                say(f"Scoring {one.name} before and after")
                before = judge(one, run, one.made_up, one.known)
                on = replace(one.made_up, sequential=False)
                after = judge(one, Run(run.recovered / folder), on, {})
                write_json(file, {"before": before, "after": after})
    return [(found["before"], found["after"]) for found in map(read_json, files)]


class _Judge:
    """Scores sub-adapters with the factors of one run or another on the same base model."""

    def __init__(self, run: Run, config: SearchConfig | ExportConfig) -> None:
        self.config = config
        self.ranking = isinstance(config, SearchConfig)  # which validation examples do
        _, base, self.net = load_run(run)
        self.tokenizer = base.tokenizer
        self.task = task_of(run)
        self.held_out = HeldOut.of(run, self.net, base.tokenizer, self.task, config.compensation)

    def __call__(
        self, one: Asked, run: Run, made_up: Compensated, known: Mapping[str, Any]
    ) -> dict[str, Any]:
        self.net.load_factors(read_factors(run.super_adapter))
        sub = one.candidate.sub_adapter
        # As it was trained: an answer that a cut head cannot say has no finite loss.
        model = self.held_out.model(self.net.space.with_whole_vocabulary(sub), made_up)
        loss = mean_loss(model, self.held_out.batches)
        model = self.net.cut_vocabulary_(model, sub)
        if one.candidate.compress and self.config.timing.runtime != "torch":
            model = round_(model, one.candidate.compress, self.config.timing.runtime)
        scores: dict[str, Any] = {"held_out_loss": loss}
        if self.ranking and "validation_accuracy" not in known:
            score = self._score(model, self.task.validation)
            scores["validation_accuracy"] = score.accuracy
        if "accuracy" not in known:
            scores |= self._score(model, self.task.test).kept()
        return {**scores, **known, "compensation": made_up.as_dict()}

    def _score(self, model: PreTrainedModel, examples: Sequence[Example]) -> Score:
        return evaluate(
            model, self.tokenizer, examples, batch_tokens=self.config.batch_tokens, label="scoring"
        )
