"""The tables of results: one fragment for every JSON file in tests/benchmarks/results.

A file that `TABLES` does not know is shown as it is: a row for each of its rows, a column for each
of their figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fragments import figures, training_figures

RESULTS = Path("tests/benchmarks/results")
DOCS = Path("docs")
OTHERS = "others.md"
VOCABULARIES = "vocabularies.md"
Found = Mapping[str, Any]
TABLES: dict[str, Callable[[Found], str]] = {
    "activation": figures.activation,
    "compact": figures.compact,
    "compensated-agnews-test": training_figures.widths,
    "compensated-agnews-validation": training_figures.widths,
    "compensated-agnews-validation-one-seed": training_figures.widths,
    "compensated-math-test": training_figures.widths,
    "compensated-sst2-test": training_figures.widths,
    "compensation-arithmetic": training_figures.compensation,
    "continual": training_figures.continual,
    "decisions": training_figures.decisions,
    "demo": figures.demo,
    "eighty": figures.eighty,
    "fronts-agnews": figures.fronts,
    "fronts-arithmetic": figures.fronts,
    "large": figures.large,
    "options": figures.options,
    "orders": training_figures.orders,
    "precisions": figures.precisions,
    "quality-agnews-validation": training_figures.widths,
    "serving": figures.serving,
    "shown-commonsense": training_figures.shown,
    "shown-math": training_figures.shown,
    "shown-sst2": training_figures.shown,
    "simulated": figures.simulated,
    "step": figures.step,
    "step-cuda": figures.step,
    "stress": figures.stress,
    "tables": figures.tables,
    "tenants": figures.tenants,
}


VOCAB = "vocab"
"""The benchmark of which every model that was tried has a result, whose name begins so."""


def tables() -> dict[str, str]:
    """File name to Markdown, for every result; for those of one benchmark together; and for those
    that no page names."""
    files = {file.stem: fragment(file) for file in sorted(RESULTS.glob("*.json"))}
    of_heads = {name: text for name, text in files.items() if is_of(name, VOCAB)}
    alone = {f"{name}.md": text for name, text in files.items() if name not in of_heads}
    return alone | {
        VOCABULARIES: together(of_heads),
        OTHERS: others(name for name in files if name not in of_heads),
    }


def is_of(name: str, benchmark: str) -> bool:
    """Whether a result of this name is this benchmark's, of one model or of several."""
    return name == benchmark or name.startswith(f"{benchmark}-")


def together(files: Mapping[str, str]) -> str:
    """One below another, each under its name."""
    return "\n".join(f"## {name}\n\n{text}" for name, text in files.items()) or NONE


NONE = "Nothing has been measured yet.\n"


def others(names: Iterable[str], docs: Path = DOCS) -> str:
    """Includes of the results that no page below `docs` includes."""
    text = "".join(page.read_text(encoding="utf-8") for page in docs.rglob("*.md"))
    left = [name for name in names if f'"results/{name}.md"' not in text]
    return "".join(f'## {name}\n\n--8<-- "results/{name}.md"\n' for name in left)


def fragment(file: Path) -> str:
    """Its table and, below it, what it was measured with."""
    found = json.loads(file.read_text(encoding="utf-8"))
    drawn = figures.vocabulary if is_of(file.stem, VOCAB) else as_it_is
    table = TABLES.get(file.stem, drawn)(found)
    return f"{table.strip()}\n\n{source(found, file)}\n"


def source(found: Found, file: Path) -> str:
    """Description, command, device, date and the file itself."""
    said = found.get("description", "")
    device = found.get("device") or found.get("report", {}).get("device", "")
    parts = [f"`{found['command']}`", device, found["date"], f"`{file}`"]
    return f"*{said[:1].upper()}{said[1:]}.*\n{{ .source }}\n\n" * bool(said) + (
        " · ".join(part for part in parts if part) + "\n{ .source }"
    )


def as_it_is(found: Found) -> str:
    """A row for every row, a column for every number or text in any of them."""
    rows: Mapping[str, Any] = found["rows"]
    names = dict.fromkeys(
        name
        for row in rows.values()
        for name, value in row.items()
        if isinstance(value, int | float | str)
    )
    return figures.table(
        ["", *names],
        [[name, *(plain(row.get(column)) for column in names)] for name, row in rows.items()],
    )


def plain(value: object) -> str:
    """A figure with four digits, as it stands in a table."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
