"""Recipes of the papers. And their benchmarks' data sets as folders of their names on the hub, with
the fields that those have and rows made up here: in the working directory `datasets` takes them for
the originals.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from elastic.config import TrainConfig
from elastic.config.parsing import parse
from elastic.evaluation.papers import SUBJECTS

METHODS = ("lonas", "sorsa", "prolora", "olora", "soslora")
RECIPES = sorted(
    file.stem
    for file in (Path(__file__).parents[2] / "configs").glob("*-train.yaml")
    if file.stem.partition("-")[0] in METHODS
)
"""Of the papers, those that train."""

GSM8K = [
    {"question": f"Ada has {n} pens and gets {n} more. How many are there?",
     "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
    for n in (600, 3, 21)
]  # fmt: skip
MATH = {
    part: [{"problem": f"Halve {2 * n + 1}.", "level": "Level 1", "type": part,
            "solution": f"It is $\\boxed{{\\dfrac{{{2 * n + 1}}}{{2}}}}$."}]
    for n, part in enumerate(SUBJECTS)
}  # fmt: skip
HUMANEVAL = [
    {"task_id": f"Made/{n}", "entry_point": name, "canonical_solution": f"    return {body}\n",
     "prompt": f'import math\n\n\ndef {name}(x):\n    """{told}"""\n',
     "test": f"def check(candidate):\n    assert candidate(3) == {expected}\n"}
    for n, (name, told, body, expected) in enumerate(
        [("double", "Twice x.", "2 * x", 6), ("root", "Of x squared.", "math.sqrt(x * x)", 3)]
    )
]  # fmt: skip
MMLU = [
    {"question": f"Which one is {n}?", "subject": "plain_counting", "choices": list("0123"),
     "answer": n} for n in range(4)
]  # fmt: skip
TYDIQA = {
    split: [
        {"id": f"{language}-{split}-{n}", "title": "A", "question": f"Who lives at {n}?",
         "context": f"The Smiths live at {n}.",
         "answers": {"text": ["The Smiths", "Smiths!"], "answer_start": [0, 4]}}
        for language in ("english", "finnish") for n in range(count)
    ]
    for split, count in (("train", 1), ("validation", 2))
}  # fmt: skip


BBH = {
    "boolean_expressions": [{"input": f"not {n} is", "target": "True"} for n in (0, "False")],
    "date_understanding": [{"input": "Which day is it?", "target": "(A)"}],
}
"""Two rows of one task, one of another."""


@functools.cache
def recipe(*names: str) -> TrainConfig:
    """The settings of recipes, later ones over earlier ones."""
    return parse(TrainConfig, [part for name in names for part in ("--config", name)])


def data_set(
    folder: Path, name: str, parts: Mapping[str | None, Mapping[str, Sequence[Mapping]]]
) -> None:
    """FOLDER/NAME: for every part (None: it has no name) a file of rows per split."""
    home, listed = folder / name, []
    for part, splits in parts.items():
        files = []
        for split, rows in splits.items():
            file = home / (part or "all") / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files.append({"split": split, "path": str(file.relative_to(home))})
        listed.append({"config_name": part or "default", "data_files": files})
    (home / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n")


def data_sets(folder: Path) -> None:
    """All that the papers' tasks ask for."""
    data_set(folder, "openai/gsm8k", {"main": {"test": GSM8K}})
    data_set(folder, "EleutherAI/hendrycks_math", {p: {"test": rows} for p, rows in MATH.items()})
    data_set(folder, "openai/openai_humaneval", {None: {"test": HUMANEVAL}})
    data_set(folder, "cais/mmlu", {"all": {"test": MMLU}})
    data_set(folder, "SaylorTwift/bbh", {name: {"test": rows} for name, rows in BBH.items()})
    data_set(folder, "google-research-datasets/tydiqa", {"secondary_task": TYDIQA})
