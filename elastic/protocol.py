"""The published protocol of LLM-Adapters and LoNAS: what counts as an answer, and the named sets.

An answer is generated and looked for in the text: the last number (right within 1e-3), the first of
A to E, or the first of the labels that the set has (lonas.md, section 4; Hu et al. 2023, arXiv
2304.01933). A text in which none is found is wrong, and counted apart.
"""

from __future__ import annotations

import re
from pathlib import Path

from elastic.errors import ConfigError, DataMissing, unknown

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
    FOLDER/NAME/test.json."""
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
