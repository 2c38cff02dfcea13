"""What a report is made of, for the terminal and for Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows of text under a title, for the terminal and for Markdown."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> Any:
        from rich.table import Table as Rich

        table = Rich(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            # A long head takes lines of its own before it takes width.
            width = max([1, *(len(row[number]) for row in self.rows)])
            head = "\n".join(wrap(column, width, break_long_words=False))
            table.add_column(head, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        return f"{self.title}:\n\n{markdown_table(self.columns, self.rows)}"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Its first column is text, the others are numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Said:
    """A prompt, and below it who says what: one line for all that say the same."""

    asked: str
    lines: Sequence[str]

    def rich(self) -> str:
        return "\n  ".join([self.asked, *self.lines])

    def markdown(self) -> str:
        return "\n".join([self.asked, "", *(f"- {line}" for line in self.lines)])


def literal(value: Any) -> str:
    """Text that markdown shows as it is, on one line."""
    flat = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>()#|~!])", r"\\\1", flat)


def code_span(value: Any) -> str:
    """A code span, on one line, that no backtick inside ends."""
    flat = " ".join(str(value).split())
    fence = fence_of(flat)
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{fence}{pad}{flat}{pad}{fence}"


def fence_of(text: str, least: int = 1) -> str:
    """Backticks that no run of them inside ends."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(least, longest + 1)
