"""Data in the form of LLM-Adapters: rows of instruction, input, output and answer.

A model is trained on the output and judged by the answer in what it says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elastic.config import TaskConfig
from elastic.errors import DataError, DataMissing
from elastic.protocol import kind_of, labels_in
from elastic.tasks.base import Example, Judge, Task, disjoint, limits

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""Stanford Alpaca's prompts (Taori et al. 2023)."""
TOKENS = {"number": 256, "letter": 256}
"""New tokens that an answer may take, by its kind; others 32."""


def load(config: TaskConfig, seed: int) -> Task:
    """Rows in file order. Without a validation file, the last rows of the training file are held
    out; they are judged like those of the test file."""
    files = {split: getattr(config, split) or config.train for split in limits(config)}
    test, train = read(config.test), read(config.train)
    validation = None if config.validation is None else read(config.validation)
    return disjoint(train, validation, test, config, files)


def read(file: str | Path) -> list[Example]:
    """A JSON list, or JSON Lines. DataError names the row that is wrong."""
    path = Path(file)
    if not path.is_file():
        raise DataMissing(f"{file}: no such data file")
    try:
        text = path.read_text(encoding="utf-8")
        listed = text.lstrip().startswith("[")
        rows = (
            json.loads(text)
            if listed
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: broken JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text: {error.reason}") from None
    if not rows:
        raise DataError(f"{file}: no rows")
    return [_example(row, f"{file}: row {number}") for number, row in enumerate(rows, 1)]


def _example(row: Any, where: str) -> Example:
    if not isinstance(row, dict) or "instruction" not in row:
        raise DataError(f"{where} has no field 'instruction'")
    answer = str(row.get("answer", "") or "").strip()
    output = str(row.get("output", "") or "").strip() or answer
    if not output:
        raise DataError(f"{where} has neither 'output' nor 'answer'")
    instruction = str(row["instruction"]).strip()
    given = str(row.get("input") or "").strip()
    template = ALPACA_INPUT if given else ALPACA
    prompt = template.format(instruction=instruction, input=given)
    kind = kind_of(answer)
    if kind is None:  # an instruction to follow; nothing to judge it by but its very words
        return Example(prompt, output)
    options = ()
    if answer in output:
        labels = labels_in(kind, f"{instruction} {given}")
        options = tuple(output.replace(answer, label) for label in labels)
    if output not in options:
        options = ()
    return Example(prompt, output, options, Judge(kind, answer, TOKENS.get(kind, 32)))
