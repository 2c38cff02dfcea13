"""Data in the form of LLM-Adapters, and the published protocol of LLM-Adapters and LoNAS: what
counts as an answer, and the named sets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic.config import TaskConfig
from elastic.data.reading import read_rows
from elastic.data.rows import ALPACA, ALPACA_INPUT, from_files, text_of
from elastic.data.task import Example, Judge, Task
from elastic.errors import ConfigError, DataError, DataMissing, unknown

TOKENS = {"number": 256, "letter": 256}
"""New tokens that an answer may take, by its kind; others 32."""


def load(config: TaskConfig, seed: int) -> Task:
    """Validation examples are judged like those of the test file."""
    return from_files(config, seed, lambda row, where: _example(row, where, config.cutoff))


def read(file: str | Path) -> list[Example]:
    """All rows of a file, in order. DataError names the row that is wrong."""
    return [_example(row, where) for where, row in read_rows(file)]


def _example(row: Mapping[str, Any], where: str, cutoff: int | None = None) -> Example:
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
        return Example(prompt, output, cutoff=cutoff, where=where)
    options: tuple[str, ...] = ()
    if answer in output:
        labels = labels_in(kind, f"{instruction} {given}")
        options = tuple(output.replace(answer, label) for label in labels)
    if output not in options:
        options = ()
    judge = Judge(kind, answer, TOKENS.get(kind, 32))
    return Example(prompt, output, options, judge, cutoff=cutoff, where=where)


TOLERANCE = 1e-3
LABELS = {
    "boolean": "true|false",
    "answer": "answer[1-5]",
    "option": "option[1-5]",
    "ending": "ending[1-4]",
    "solution": "solution[1-2]",
}
"""Kinds of labels, as patterns."""
NUMBER, LETTER = "number", "letter"
_NUMBER = re.compile(r"-?\d+\.?\d*")
GROUPS = {
    "math": ("gsm8k", "aqua", "mawps", "svamp"),
    "commonsense": (
        "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "arc_easy", "arc_challenge",
        "openbookqa",
    ),
}  # fmt: skip
"""Sets that are reported together."""
FOLDERS = {
    "aqua": "AQuA",
    "svamp": "SVAMP",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
}
"""What LLM-Adapters calls the folder of a set, where not by its name."""


def kind_of(answer: str) -> str | None:
    """How an answer like this one is looked for; None if no rule knows it."""
    if re.fullmatch(r"-?[\d,]+\.?\d*", answer.strip()):
        return NUMBER
    if re.fullmatch(r"[A-E]", answer.strip()):
        return LETTER
    for kind, pattern in LABELS.items():
        if re.fullmatch(pattern, answer.strip().lower()):
            return kind
    return None


def extract(kind: str, text: str) -> str | None:
    """The answer in a generated text; None if there is none."""
    if kind == NUMBER:
        numbers = _NUMBER.findall(text.replace(",", ""))
        return numbers[-1] if numbers else None
    pattern = r"[A-E]" if kind == LETTER else LABELS[kind]
    match = re.search(pattern, text if kind == LETTER else text.lower())
    return match[0] if match else None


def matches(kind: str, answer: str | None, expected: str) -> bool:
    """Whether an answer is the expected one; numbers may differ by `TOLERANCE`."""
    if answer is None:
        return False
    if kind == NUMBER:
        return abs(float(answer) - float(expected.replace(",", ""))) <= TOLERANCE
    return answer.lower() == expected.strip().lower()


def labels_in(kind: str, instruction: str) -> tuple[str, ...]:
    """The labels to choose among, in order: those that the instruction names."""
    if kind not in LABELS:
        return ()
    return tuple(sorted(set(re.findall(LABELS[kind], instruction.lower()))))


def sets_of(names: list[str]) -> list[str]:
    """Names of sets, those of a group for its name; ConfigError on others."""
    known = [*GROUPS, *(name for group in GROUPS.values() for name in group)]
    for name in names:
        if name not in known:
            raise ConfigError(unknown("task", name, known))
    return list(dict.fromkeys(each for name in names for each in GROUPS.get(name, (name,))))


def file_of(name: str, data: Path) -> Path:
    """Of a set: FOLDER/NAME.test.jsonl, also in a folder of its group, or LLM-Adapters'
    FOLDER/NAME/test.json. DataMissing names all three."""
    [group] = [group for group, names in GROUPS.items() if name in names]
    tried = [
        data / f"{name}.test.jsonl",
        data / group / f"{name}.test.jsonl",
        data / FOLDERS.get(name, name) / "test.json",
    ]
    for file in tried:
        if file.is_file():
            return file
    raise DataMissing(f"{name}: none of {', '.join(map(str, tried))}; say where with --data")
