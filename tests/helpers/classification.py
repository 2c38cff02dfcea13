"""A tiny classification task, and runs of tiny classifiers on it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from elastic.config import AdapterConfig, ModelConfig, TaskConfig, TrainConfig
from elastic.formats import hf
from tests.helpers import tiny
from tests.helpers.families import model_of
from tests.helpers.tiny_runs import train_config

LETTERS = "abcdefgh"


def task_of(folder: Path, **settings) -> TaskConfig:
    """Two texts of two letters each; the class is told by whether the letters differ by an even
    number."""
    rows = [
        {"one": f"{a} {b}", "other": f"{b} {a}", "label": ("no", "yes")[(ord(a) - ord(b)) % 2]}
        for a in LETTERS
        for b in LETTERS
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[::2] + rows[1::4]), ("test", rows[3::4])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text)
    known = dict(
        name="jsonl", train=str(folder / "train.jsonl"), test=str(folder / "test.jsonl"),
        prompt="{one}", answer="label", train_examples=32, validation_examples=8, test_examples=16,
        draw="position",  # these rows are in no order that matters
    )  # fmt: skip
    return TaskConfig(**(known | settings))


def classifier_config(folder: Path, family: str = "bert, classes", **overrides) -> TrainConfig:
    """A run of this family with a new head, in folder/run."""
    base = folder / "base"
    if not base.is_dir():
        hf.write(model_of(family, torch.float32), tiny.tokenizer(), base)
    model = {"path": str(base), "dtype": "float32", "device": "cpu", "head": "classification"}
    model |= overrides.pop("model", {})
    settings = dict(
        space="auto", stages=[], adapter=AdapterConfig(rank=8), model=ModelConfig(**model),
        task=task_of(folder, **overrides.pop("task", {})),
    )  # fmt: skip
    return train_config(base, overrides.pop("run", folder / "run"), **(settings | overrides))
