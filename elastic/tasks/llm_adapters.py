"""Data in the form of LLM-Adapters: rows of instruction, input, output and answer.

A model is trained on the output and judged by the answer in what it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic.config import TaskConfig
from elastic.errors import DataError
from elastic.protocol import kind_of, labels_in
from elastic.tasks.base import Example, Judge, Task
from elastic.tasks.rows import ALPACA, ALPACA_INPUT, from_files, read_rows, text_of

TOKENS = {"number": 256, "letter": 256}
"""New tokens that an answer may take, by its kind; others 32."""


def load(config: TaskConfig, seed: int) -> Task:
    """Validation examples are judged like those of the test file."""
    return from_files(config, _example)


def read(file: str | Path) -> list[Example]:
    """A JSON list, or JSON Lines. DataError names the row that is wrong."""
    return [_example(row, where) for where, row in read_rows(file)]


def _example(row: Mapping[str, Any], where: str) -> Example:
    if row.get("instruction") is None:
        told = sorted(name for name in row if row[name] is not None)
        raise DataError(f"{where}: no field 'instruction'; the row has {', '.join(told)}")
    instruction, given, output, answer = (
        text_of(row.get(name), f"{where}: field {name!r}").strip()
        for name in ("instruction", "input", "output", "answer")
    )
    output = output or answer
    if not output:
        raise DataError(f"{where}: neither 'output' nor 'answer'")
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
