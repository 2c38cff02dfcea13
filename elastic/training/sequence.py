"""A sequence of tasks, trained one after another; every seen one is tested after each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic import distributed, plotting
from elastic.config import TaskConfig, TrainConfig
from elastic.console import say, wide
from elastic.data import load_task
from elastic.errors import ConfigError, DataMissing
from elastic.evaluation.evaluate import answers, same_text
from elastic.evaluation.statistics import Score
from elastic.files import clear_leftovers, write_json, write_json_lines
from elastic.provenance import provenance
from elastic.run import Run
from elastic.training.checks import as_begun

if TYPE_CHECKING:
    from elastic.data.task import Example


_PLACE = "{task}"


@dataclass(frozen=True)
class Sequential:
    """What a sequence of tasks left: scores[t][i] is task i after training on task t, i <= t."""

    run: Run
    tasks: Sequence[str]
    scores: Sequence[Sequence[Score]]

    def accuracy(self, after: int, task: int) -> float:
        return self.scores[after][task].accuracy

    @property
    def average(self) -> float:
        """Mean over tasks after the last one (AA)."""
        return sum(score.accuracy for score in self.scores[-1]) / len(self.tasks)

    @property
    def backward_transfer(self) -> float:
        """Mean change of the earlier tasks since each was trained (BWT; Lopez-Paz and Ranzato
        2017, arXiv 1706.08840); 0 for a single task."""
        last = len(self.tasks) - 1
        changes = [self.accuracy(last, i) - self.accuracy(i, i) for i in range(last)]
        return sum(changes) / last if last else 0.0

    @property
    def forgetting(self) -> float:
        """Mean drop of the earlier tasks from the best they ever were (Chaudhry et al. 2018,
        arXiv 1801.10112); 0 for a single task."""
        last = len(self.tasks) - 1
        drops = [
            max(self.accuracy(t, i) for t in range(i, last)) - self.accuracy(last, i)
            for i in range(last)
        ]
        return sum(drops) / last if last else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "tasks": list(self.tasks),
            "average_accuracy": self.average,
            "backward_transfer": self.backward_transfer,
            "forgetting": self.forgetting,
            "accuracy": [[score.accuracy for score in row] for row in self.scores],
            "interval": [[list(score.interval) for score in row] for row in self.scores],
            "n": [score.n for score in self.scores[-1]],
        }

    def save(self) -> None:
        """Write RUN/continual.json and, where it can be drawn, RUN/continual.png."""
        config = self.run.begun()
        contents = {
            **self.as_dict(),
            "method": config.adapter.resolved_method,
            "name_in_prompt": config.task.name_data
            if config.task.name == "instructions"
            else _PLACE in config.task.prompt,
            "seed": config.seed,
            **provenance(config.model.device),
        }
        write_json(self.run.path / "continual.json", contents)
        if plotting.draws(plot := self.run.path / "continual.png"):
            self._plot(plot)

    def show(self) -> None:
        from rich.table import Table

        table = Table(title="Accuracy on the test examples of each task")
        for column in ("after", *self.tasks):
            table.add_column(column, justify="left" if column == "after" else "right")
        for name, row in zip(self.tasks, self.scores, strict=True):
            table.add_row(name, *(f"{score.accuracy:.1%}" for score in row))
        console = wide()
        console.print(table)
        console.print(
            f"Average {self.average:.1%}, backward transfer {self.backward_transfer:+.1%}, "
            f"forgetting {self.forgetting:.1%}; n = {[score.n for score in self.scores[-1]]}"
        )
        console.print(plotting.where_drawn(str(self.run.path / "continual.png")))
        last = stage_path(self.run, len(self.tasks) - 1, self.tasks[-1])
        console.print(f"Next: elastic search {last} --budget.prefill_ms 80%")
        print(json.dumps({"continual": str(self.run.path / "continual.json")}))

    def _plot(self, path: Path) -> None:
        figure, axes = plotting.canvas(8, 4.5)
        for i, task in enumerate(self.tasks):
            at = range(i, len(self.tasks))
            scores = [self.scores[t][i] for t in at]
            ys, bars = plotting.percent_bars(
                (score.accuracy for score in scores), (score.interval for score in scores)
            )
            axes.errorbar(at, ys, yerr=bars, marker="o", capsize=3, label=task)
        axes.set_xticks(range(len(self.tasks)), [f"after {task}" for task in self.tasks])
        if len(self.tasks) > 6:
            axes.tick_params(axis="x", rotation=60)
        axes.set_ylabel("test accuracy, % (95 % interval)")
        axes.set_ylim(-2, 102)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
        plotting.save(figure, path)


def train_sequence(config: TrainConfig) -> Sequential:
    """Train each task from where the one before ended; RUN/tasks/NN-NAME is a run of its own.

    All data is read and checked before weights load. A killed sequence resumes within its stage.
    ConfigError for tasks that do not go together.
    """
    run = Run(config.run)
    with run.alone():
        return _train_alone(run, config)


def _train_alone(run: Run, config: TrainConfig) -> Sequential:
    from elastic.training import one_task

    config = as_begun(config)
    with distributed.main_first():
        run.claim(config)
    stages = stage_configs(config)
    try:
        tests = [load_task(stage.task, config.seed).test for stage in stages]
    except DataMissing as error:
        raise ConfigError(f"tasks: {error}") from None
    with distributed.main_first():
        run.begin(config)
    scores = []
    for number, stage in enumerate(stages):
        say(f"Task {number + 1} of {len(stages)}: {config.tasks[number]}")
        trained = one_task.train_one(stage)
        seen = dict(zip(config.tasks[: number + 1], tests, strict=False))
        scores.append(distributed.shared(partial(_score_all, trained, seen, config)))
    found = Sequential(run, tuple(config.tasks), tuple(scores))
    if distributed.is_main():
        found.save()
    return found


def stage_configs(config: TrainConfig) -> list[TrainConfig]:
    """The configuration of each stage's run."""
    return [stage_config(config, number) for number in range(len(config.tasks))]


def stage_path(run: Run, number: int, name: str) -> Path:
    """The run directory of one stage."""
    return run.tasks / f"{number + 1:02d}-{name}"


def stage_config(config: TrainConfig, number: int) -> TrainConfig:
    """The settings of one task of the sequence, as a run of its own."""
    run, name = Run(config.run), config.tasks[number]
    own = {key: values[number] for key, values in config.sequence.lists().items()}
    lambdas = {key: value for key, value in own.items() if key.startswith("lambda")}
    adapter = replace(config.adapter, olora=replace(config.adapter.olora, **lambdas))
    unset: dict[str, Any] = dict.fromkeys(config.sequence.lists())
    stages, lr = list(config.resolved_stages), config.lr
    if "epochs" in own:
        stages[-1] = replace(stages[-1], epochs=own["epochs"])
    if "base_lr" in own:
        lr = replace(lr, base_lr=own["base_lr"])
    before = config.start_from
    if number:
        before = str(stage_path(run, number - 1, config.tasks[number - 1]))
    return replace(
        config,
        run=str(stage_path(run, number, name)),
        task=_named(config.task, name),
        tasks=[],
        sequence=replace(config.sequence, **unset),
        start_from=before,
        adapter=adapter,
        stages=stages,
        lr=lr,
    )


def _named(task: TaskConfig, name: str) -> TaskConfig:
    """The task with its name put where {task} stands."""
    texts = {key: text for key, text in vars(task).items() if _PLACE in str(text)}
    if not texts:
        raise ConfigError(
            "tasks: nothing in the settings of `task` depends on the name; write {task} where it "
            "belongs, such as --task.train data/{task}.train.jsonl"
        )
    return replace(task, **{key: text.replace(_PLACE, name) for key, text in texts.items()})


def _score_all(
    trained: Run, seen: dict[str, Sequence[Example]], config: TrainConfig
) -> list[Score]:
    """Scores of all tasks seen so far, from RUN/tasks/NN-NAME/predictions where they stand."""
    folder = trained.path / "predictions"
    clear_leftovers(folder)
    files = {name: folder / f"{name}.jsonl" for name in seen}
    if missing := [name for name in seen if not files[name].is_file()]:
        from elastic.supernet.store import load_run

        _, base, net = load_run(trained)
        for name in missing:
            found = answers(
                net.model, base.tokenizer, seen[name], new_tokens=config.sequence.new_tokens,
                batch=config.sequence.batch, label=f"testing {name}",
            )  # fmt: skip
            rows = [
                {
                    "prompt": example.prompt,
                    "answer": example.answer,
                    "prediction": text,
                    "correct": same_text(text, example.answer),
                }
                for example, text in zip(seen[name], found, strict=True)
            ]
            write_json_lines(files[name], rows)
    texts = (file.read_text(encoding="utf-8").splitlines() for file in files.values())
    return [Score(tuple(json.loads(line)["correct"] for line in lines)) for lines in texts]
