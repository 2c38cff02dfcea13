"""Data sets in the layout of O-LoRA's benchmark (arXiv 2310.14152): instructions with options.

A folder TYPE/NAME holds train.json, test.json and perhaps dev.json, each a list of objects with
`sentence` and `label`, and labels.json, the list of answers. The type decides the question.
"""

from __future__ import annotations

import glob
import random
from pathlib import Path
from typing import Any

from elastic.config import TaskConfig
from elastic.data.reading import read_json
from elastic.data.rows import answer_of
from elastic.data.task import Example, Task, disjoint, limits
from elastic.errors import DataError, DataMissing

QUESTIONS = {
    "TC": "Which topic is this text about?",
    "SC": "Which sentiment does this text express?",
    "NLI": "How does the second sentence relate to the first?",
    "QQP": "Do the two questions mean the same?",
    "BoolQA": "Is the answer to the question about this passage true or false?",
    "MultiRC": "Is this answer to the question about the passage right?",
    "WiC": "Is the word used in the same sense in both sentences?",
    "COPA": "",
}
"""In our words, by task type; COPA has neither question nor options."""


def load(config: TaskConfig, seed: int) -> Task:
    """Rows of each split, shuffled by the seed; without dev.json validation is held out of
    training. A row whose prompt also stands in the test split is dropped from the other two.

    DataError names the file or folder that cannot be used.
    """
    assert config.folder is not None
    folder = _folder(config.folder)
    labels = read_json(folder / "labels.json")
    if not isinstance(labels, list) or not labels:
        raise DataError(f"{folder / 'labels.json'}: expected a list of answers")
    test, train = (_read(folder, split, labels, config, seed) for split in ("test", "train"))
    dev = _read(folder, "dev", labels, config, seed) if (folder / "dev.json").is_file() else None
    return disjoint(train, dev, test, config, dict.fromkeys(limits(config), str(folder)))


def _folder(pattern: str) -> Path:
    found = [Path(path) for path in sorted(glob.glob(pattern)) if Path(path).is_dir()]
    if not found:
        raise DataMissing(f"{pattern}: no such folder; expected one like TC/agnews")
    if len(found) > 1:
        raise DataError(f"{pattern}: {len(found)} folders match: {found}; name one like TC/agnews")
    if found[0].parent.name not in QUESTIONS:
        raise DataError(
            f"{found[0]}: its parent names the type of task; choose from {', '.join(QUESTIONS)}"
        )
    return found[0]


def _read(
    folder: Path, split: str, labels: list[Any], config: TaskConfig, seed: int
) -> list[Example]:
    file = folder / f"{split}.json"
    rows = read_json(file)
    if not isinstance(rows, list):
        raise DataError(f"{file}: expected a list of rows, got {type(rows).__name__}")
    examples = []
    for number, row in enumerate(rows):
        for name in ("sentence", "label"):
            if not isinstance(row, dict) or row.get(name) is None:
                raise DataError(f"{file}: row {number} has no field {name!r}")
        where = f"{file}: row {number}"
        answer = answer_of(row["label"], f"{where}: field 'label'")
        prompt = _prompt(folder, row, labels, config)
        examples.append(Example(prompt, answer, cutoff=config.cutoff, where=where))
    random.Random(f"{seed}/{split}").shuffle(examples)
    return examples


def _prompt(folder: Path, row: dict[str, Any], labels: list[Any], config: TaskConfig) -> str:
    kind = folder.parent.name
    lines = [f"Task:{kind}"]
    if config.name_data:
        lines.append(f"Dataset:{folder.name}")
    if QUESTIONS[kind]:
        question = f"{QUESTIONS[kind]} Choose one of the options."
        lines += [question, f"Option: {', '.join(map(str, labels))} "]
    return "\n".join([*lines, str(row["sentence"]), "Answer:"])
