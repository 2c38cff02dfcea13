"""The families of transformers, as `python -m tests.zoo` has seen them: what is elastic of each, or
with which words it is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from elastic.supernet.discovery import shipped_for
from fragments.figures import table

OUTCOMES = Path("tests/zoo/outcomes.json")
USES = ("causal", "encoder-decoder", "classification")
Families = Mapping[str, Mapping[str, Any]]
"""By type of model and use."""


def pages() -> dict[str, str]:
    """File name to Markdown."""
    stored = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    families = stored["families"]
    counts = {what: sum(one["what"] == what for one in families.values())
              for what in ("right", "refused", "not built")}  # fmt: skip
    told = (
        f"Of {len(families)} pairs of a model type and a use in transformers "
        f"{stored['transformers']}, {counts['right']} are right, {counts['refused']} are refused, "
        f"and {counts['not built']} cannot be built where this was made. As ONNX, "
        f"{sum(one.get('onnx') == 'right' for one in families.values())} are right."
    )
    return {
        "counts.md": f"{told}\n",
        "right.md": f"{right(families)}\n",
        "refused.md": f"{by_reason(families, 'refused')}\n",
        "not-built.md": f"{by_reason(families, 'not built')}\n",
        "no-graph.md": f"{table(['reason', 'families'], without_graph(families))}\n",
    }


def right(families: Families) -> str:
    """A row for every type of model that is right for some use: what is elastic of it."""
    types = dict.fromkeys(name.partition(", ")[0] for name in families)
    rows = []
    for kind in types:
        cells = [families.get(f"{kind}, {use}", {}) for use in USES]
        if any(one.get("what") == "right" for one in cells):
            shipped = shipped_for(kind)
            rows.append(
                [
                    f"`{kind}`",
                    *map(_cell, cells),
                    f"`{Path(shipped.source).stem}`" if shipped else "",
                ]
            )
    return table(["model type", *USES, "shipped space"], rows)


def _cell(one: Mapping[str, Any]) -> str:
    if one.get("what") != "right":
        return one.get("what", "")
    return ", ".join(one["elastic"]) + ("" if one["onnx"] == "right" else "; no ONNX")


def by_reason(families: Families, what: str) -> str:
    """A row for every reason, with all that it is given for."""
    words = {name: one["words"] for name, one in families.items() if one["what"] == what}
    return table(["reason", "families"], _grouped(words))


def without_graph(families: Families) -> list[list[str]]:
    """The same of families that are right, but not as ONNX."""
    words = {name: one["onnx"] for name, one in families.items() if one["what"] == "right"}
    return _grouped({name: reason for name, reason in words.items() if reason != "right"})


def _grouped(words: Mapping[str, str]) -> list[list[str]]:
    """Reason and families, the reason of most families first."""
    found: dict[str, list[str]] = {}
    for name, reason in words.items():
        found.setdefault(_reason(reason), []).append(name)
    lines = sorted(found.items(), key=lambda item: -len(item[1]))
    return [[reason, ", ".join(_by_use(names))] for reason, names in lines]


def _reason(words: str) -> str:
    """The words of a refusal, without the class and the folder that they name."""
    words = words.removeprefix("model.path FOLDER/base: ")
    words = re.sub(r"(Unrecognized configuration class) .*", r"\1", words)
    return re.sub(r"\b[A-Z]\w*For[A-Z]\w*", "...", words)


def _by_use(names: list[str]) -> Iterator[str]:
    """Types of model, each once, with its uses unless it is causal alone."""
    uses: dict[str, list[str]] = {}
    for name in names:
        kind, _, use = name.partition(", ")
        uses.setdefault(kind, []).append(use)
    for kind, those in uses.items():
        yield f"`{kind}`" + ("" if those == ["causal"] else f" ({', '.join(those)})")
