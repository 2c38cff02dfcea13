"""`elastic evaluate`: one sub-adapter on a split of its own task, or on published sets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic import protocol
from elastic.config import EvaluateConfig
from elastic.evaluate import Score, evaluate
from elastic.files import write_json
from elastic.provenance import provenance
from elastic.run import Run
from elastic.tasks import Example, llm_adapters, load_task


@dataclass(frozen=True)
class Evaluation:
    """What `elastic evaluate` found on a split of the run's own task."""

    name: str
    split: str
    score: Score

    def show(self) -> None:
        print(f"{self.name} on {self.split}: {self.score}")
        print(json.dumps({"sub_adapter": self.name, "split": self.split, **self.score.as_dict()}))


@dataclass(frozen=True)
class Published:
    """What `elastic evaluate --tasks` found, set by set."""

    name: str
    scores: Mapping[str, Score]
    file: Path

    @property
    def average(self) -> float:
        """Of the accuracies of the sets, as published."""
        return sum(score.accuracy for score in self.scores.values()) / len(self.scores)

    def show(self) -> None:
        for name, score in self.scores.items():
            lost = f", {score.unanswered} without an answer" if score.unanswered else ""
            print(f"{self.name} on {name}: {score}{lost}")
        print(f"average of {len(self.scores)}: {self.average:.1%}; {self.file}")
        found = {name: score.as_dict() for name, score in self.scores.items()}
        print(json.dumps({"sub_adapter": self.name, "average": self.average, "sets": found}))


def evaluate_run(config: EvaluateConfig) -> Evaluation | Published:
    """`elastic evaluate`: one sub-adapter, active in the supernet, on one split or on published
    sets, whose predictions are written to RUN/evaluate."""
    run = Run(config.run)
    trained = run.config()
    sets = {
        name: llm_adapters.read(protocol.file_of(name, Path(config.data)))[: config.examples]
        for name in protocol.sets_of(config.tasks)
    }
    if not sets:
        sets = {config.split: getattr(load_task(trained.task, trained.seed), config.split)}
    _, base, net = run.load()
    name, sub = run.resolve(config.sub_adapter, net.space, trained.seed)
    beams = config.beams if config.tasks and config.protocol == "published" else None
    scores = {}
    with net.active(sub) as model:
        for label, examples in sets.items():
            scores[label] = evaluate(
                model, base.tokenizer, examples, batch_tokens=config.batch_tokens, beams=beams,
                batch=config.batch, label=label,
            )  # fmt: skip
    if not config.tasks:
        return Evaluation(name, config.split, scores[config.split])
    what = "-".join([name, config.protocol, *config.tasks])
    some = f"-first-{config.examples}" if config.examples else ""
    file = run.path / "evaluate" / f"{what}{some}.json"
    file.parent.mkdir(exist_ok=True)
    about = {"sub_adapter": sub.as_dict(), "name": name, "protocol": config.protocol,
             "beams": beams, **provenance(str(base.model.device))}  # fmt: skip
    predictions = {
        label: {**scores[label].as_dict(), "predictions": _predictions(examples, scores[label])}
        for label, examples in sets.items()
    }
    write_json(file, {**about, "sets": predictions})
    return Published(name, scores, file)


def _predictions(examples: Sequence[Example], score: Score) -> list[dict[str, Any]]:
    said = score.said or (None,) * score.n
    return [
        {
            "prompt": example.prompt,
            "expected": example.judge.expected if example.judge else example.answer,
            "said": text,
            "right": right,
        }
        for example, text, right in zip(examples, said, score.correct, strict=True)
    ]
