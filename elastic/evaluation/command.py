"""`elastic evaluate`: one sub-adapter on a split of its own task, or on published sets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.config import EvaluateConfig
from elastic.console import say
from elastic.data import llm_adapters
from elastic.data.task import Example, some
from elastic.data.vocabulary import Sayable
from elastic.errors import ConfigError
from elastic.evaluation import statistics
from elastic.evaluation.evaluate import evaluate
from elastic.evaluation.harness import HarnessReport, run_harness
from elastic.evaluation.perplexity import Perplexity, perplexity_of
from elastic.evaluation.statistics import Score
from elastic.files import tag, write_json, write_json_lines
from elastic.models import loading
from elastic.models.kinds import Kind, classes_of, is_number
from elastic.provenance import provenance
from elastic.run import Run
from elastic.supernet.examples import task_of
from elastic.supernet.held_out import Compensated, compensated
from elastic.supernet.store import load_run
from elastic.supernet.vocabulary import said_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Evaluation:
    """What `elastic evaluate` found on a split of the run's own task."""

    name: str
    split: str
    score: Score
    metrics: Mapping[str, Any]
    """Of a classifier, beside its accuracy."""
    made_up: Compensated
    file: Path
    """Of every example a line of JSON: prompt, expected, said (null where the likeliest tokens were
    not the answer), right."""
    sayable: Sayable | None = None
    """Of these answers; None where the head computes all tokens."""

    def show(self) -> None:
        print(f"{self.name} on {self.split}: {self.score}")
        if "pearson" in self.metrics:
            print("Correlation {pearson:.3f} (Pearson), {spearman:.3f} (Spearman)".format_map(
                self.metrics))  # fmt: skip
        elif self.metrics:
            each = ", ".join(f"{name} {value:.3f}" for name, value in self.metrics["f1"].items())
            print(f"Matthews correlation {self.metrics['matthews']:.3f}; F1 of {each}")
        if self.sayable:
            print(f"Its head knows {self.sayable}")
        if self.made_up != Compensated():
            print(f"Compensation: {self.made_up}")
        print(f"Example by example: {self.file}")
        about = {"sub_adapter": self.name, "split": self.split,
                 "compensation": self.made_up.as_dict()}  # fmt: skip
        known = {"vocabulary": self.sayable.as_dict()} if self.sayable else {}
        print(json.dumps({**about, **self.score.as_dict(), **self.metrics, **known}))


@dataclass(frozen=True)
class Published:
    """What `elastic evaluate --tasks` found, set by set."""

    name: str
    scores: Mapping[str, Score]
    file: Path
    sayable: Mapping[str, Sayable]
    """Of the answers of every set; empty where the head computes all tokens."""

    @property
    def average(self) -> float:
        """Of the accuracies of the sets, as published."""
        return sum(score.accuracy for score in self.scores.values()) / len(self.scores)

    def show(self) -> None:
        for name, score in self.scores.items():
            lost = f", {score.unanswered} without an answer" if score.unanswered else ""
            print(f"{self.name} on {name}: {score}{lost}")
        for name, told in self.sayable.items():
            print(f"{name}: its head knows {told}")
        print(f"average of {len(self.scores)}: {self.average:.1%}; {self.file}")
        about = {"sub_adapter": self.name, "average": self.average}
        print(json.dumps({**about, "sets": self.by_set()}))

    def by_set(self) -> dict[str, dict[str, Any]]:
        """For JSON."""
        known = {name: {"vocabulary": told.as_dict()} for name, told in self.sayable.items()}
        return {name: {**score.as_dict(), **known.get(name, {})}
                for name, score in self.scores.items()}  # fmt: skip


def evaluate_run(
    config: EvaluateConfig,
) -> Evaluation | Published | HarnessReport | Perplexity:
    """`elastic evaluate`: one sub-adapter, active in the supernet, on one split or on published
    sets, with what it says to every example in RUN/evaluate, or on what else was named. ConfigError
    for settings that do not go together."""
    run = Run(config.run)
    trained = run.config()
    asked = next((name for name in ("tasks", "harness", "text") if getattr(config, name)), None)
    if asked and loading.kind_of_base(trained.model) is Kind.CLASSIFIER:
        raise ConfigError(
            f"{asked}: wants a model that answers with text, {run.path} has a classification head; "
            "evaluate it on a split of its own task"
        )
    if config.harness:
        return run_harness(config)
    if config.text:
        return perplexity_of(config)
    sets = {
        name: some(
            llm_adapters.read(llm_adapters.file_of(name, Path(config.data))), config.examples
        )
        for name in llm_adapters.sets_of(config.tasks)
    }
    if not sets:
        sets = {config.split: some(task_of(run).split(config.split), config.examples)}
    chosen = run.chosen(config.sub_adapter)
    _, base, net = load_run(run, config.dtype, chosen)
    name, sub = chosen.name, chosen.at(net.space, trained.seed)
    if mode := chosen.compress:
        say(f"{name} was chosen with {mode} weights; here they are as trained. An export's report "
            "has the accuracy of its compressed graph")  # fmt: skip
    beams = config.beams if config.tasks and config.protocol == "published" else None
    scores = {}
    opened = compensated(run, net, base.tokenizer, chosen, sub, config.compensation)
    with opened as (model, made_up):
        for label, examples in sets.items():
            scores[label] = evaluate(
                model, base.tokenizer, examples, batch_tokens=config.batch_tokens, beams=beams,
                batch=config.batch, label=label,
            )  # fmt: skip
    file = _file(run, name, config)
    if not config.tasks:
        score, examples = scores[config.split], sets[config.split]
        metrics = _metrics(net.model, examples, score) if net.head else {}
        write_json_lines(file, _predictions(examples, score))
        can_say = said_by(net, base.tokenizer, sub, examples)
        return Evaluation(name, config.split, score, metrics, made_up, file, can_say)
    about = {"sub_adapter": sub.as_dict(), "name": name, "compensation": made_up.as_dict(),
             "protocol": config.protocol, "beams": beams, "data": config.data,
             **provenance(str(base.model.device))}  # fmt: skip
    told = {label: said_by(net, base.tokenizer, sub, examples) for label, examples in sets.items()}
    published = Published(name, scores, file, {label: one for label, one in told.items() if one})
    predictions = {
        label: {**found, "predictions": _predictions(sets[label], scores[label])}
        for label, found in published.by_set().items()
    }
    write_json(file, {**about, "sets": predictions})
    return published


def _file(run: Run, name: str, config: EvaluateConfig) -> Path:
    """Of this sub-adapter, its split or these sets and what departs from the defaults."""
    parts = [name, *([config.protocol, *config.tasks] if config.tasks else [config.split])]
    if config.beams != EvaluateConfig.beams:
        parts.append(f"beams-{config.beams}")
    if config.data != EvaluateConfig.data:
        parts.append(f"data-{tag(str(Path(config.data).resolve()))}")
    if config.examples:
        parts.append(f"{config.examples}-drawn")
    if config.dtype:
        parts.append(config.dtype)
    return run.path / "evaluate" / f"{'-'.join(parts)}.{'json' if config.tasks else 'jsonl'}"


def _metrics(model: PreTrainedModel, examples: Sequence[Example], score: Score) -> dict[str, Any]:
    classes = classes_of(model)
    answers = [answer or "" for answer in score.said]  # a head always answers
    if is_number(classes):
        expected, said = ([float(one) for one in each] for each in
                          ((example.answer for example in examples), answers))  # fmt: skip
        return {"pearson": statistics.pearson(expected, said),
                "spearman": statistics.spearman(expected, said)}  # fmt: skip
    table = statistics.confusion(classes, [example.answer for example in examples], answers)
    f1 = dict(zip(classes, statistics.f1(table), strict=True))
    return {"matthews": statistics.matthews(table), "f1": f1}


def _predictions(examples: Sequence[Example], score: Score) -> list[dict[str, Any]]:
    said = score.said or (None,) * score.n
    return [
        {
            "prompt": example.text,
            "expected": example.judge.expected if example.judge else example.answer,
            "said": text,
            "right": right,
        }
        for example, text, right in zip(examples, said, score.correct, strict=True)
    ]
