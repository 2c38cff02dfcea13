"""What comes of every family, as it was seen: the file, and how one outcome differs from it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from elastic.files import write_text
from tests.zoo.judging import REFUSED, Outcome

FILE = Path(__file__).parent / "outcomes.json"
Family = tuple[str, str]
"""Type of model, and what it is for."""


def name_of(family: Family) -> str:
    """As the file calls it."""
    return ", ".join(family)


def read(file: Path = FILE) -> dict[str, Outcome]:
    """By name of the family; none if there is no such file, or if it is of another release."""
    if not file.is_file():
        return {}
    stored = json.loads(file.read_text(encoding="utf-8"))
    if stored["transformers"] != transformers.__version__:
        return {}
    return {name: outcome_of(one) for name, one in stored["families"].items()}


def outcome_of(stored: Mapping[str, Any]) -> Outcome:
    """The inverse of `Outcome.as_dict`."""
    return Outcome(**{**stored, "elastic": tuple(stored.get("elastic", ()))})


def write(outcomes: Mapping[str, Outcome], file: Path = FILE) -> None:
    """Sorted by name, with the release that they were seen with."""
    families = {name: outcomes[name].as_dict() for name in sorted(outcomes)}
    stored = {"transformers": transformers.__version__, "families": families}
    write_text(file, json.dumps(stored, indent=1) + "\n")


def difference(expected: Outcome | None, seen: Outcome) -> str | None:
    """One line about what has changed; None if nothing has."""
    if expected is None:
        return f"new: {told(seen)}"
    same = expected.what == seen.what and expected.elastic == seen.elastic
    if seen.onnx and seen.onnx != expected.onnx:
        same = False
    if same and (seen.what != REFUSED or expected.words in seen.words):
        return None
    return f"was {told(expected)}; is {told(seen)}"


def told(outcome: Outcome) -> str:
    """An outcome in a line."""
    graph = outcome.onnx and f"(as ONNX: {outcome.onnx})"
    return " ".join(filter(None, [outcome.what, ", ".join(outcome.elastic), outcome.words, graph]))


def in_ci(family: Family) -> bool:
    """Whether it is of the quarter that is judged with every change."""
    return zlib.crc32(name_of(family).encode()) % 4 == 0
