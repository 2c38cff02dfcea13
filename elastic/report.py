"""The report of an export, as a table and as one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TIMES = ("prefill_ms", "full_prefill_ms"), ("decode_ms", "full_decode_ms")


@dataclass(frozen=True)
class Report:
    """What was written, and proof that it is what was trained."""

    directory: Path
    contents: Mapping[str, Any]
    warnings: Sequence[str] = ()

    def show(self) -> None:
        from rich.console import Console
        from rich.table import Table

        c, console = self.contents, Console(width=max(110, Console().width))
        low, high = c["accuracy_interval"] or (float("nan"),) * 2
        console.print(
            f"Sub-adapter [bold]{c['name']}[/]: {c['params'] / 1e6:.1f} M of "
            f"{c['full_params'] / 1e6:.1f} M parameters, {c['macs'] / c['full_macs']:.0%} of the "
            f"operations per token"
        )
        if c["accuracy"] is not None:
            console.print(
                f"Accuracy {c['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}) "
                f"on {c['accuracy_n']} test examples the search never saw"
            )
        if "merge" in c:
            _show_merge(console, c["merge"])
        table = Table()
        decodes = any(found.get("full_decode_ms") for found in c["formats"].values())
        times = [name for pair in _TIMES[: 1 + decodes] for name in pair]
        columns = ["prefill ms", "full model", "decode ms", "full model"][: len(times)]
        answer = "greedy" if decodes else "class"
        for column in ("", "size", *columns, "max logit diff", answer):
            table.add_column(column, justify="right" if column else "left")
        skipped = []
        for name, found in c["formats"].items():
            if "skipped" in found:
                skipped.append(f"{name}: not written: {found['skipped']}")
                continue
            table.add_row(
                name,
                f"{found['bytes'] / 1e6:.0f} MB",
                *(f"{found[kind]:.1f}" for kind in times),
                f"{found['max_abs_diff']:.1e}",
                "equal" if found["greedy_tokens_equal"] else "DIFFERS",
            )
        console.print(table)
        for line in (*skipped, *self.warnings):
            console.print(line, markup=False)
        for found in c["formats"].values():
            if "path" in found:
                print(found["path"])
        print(json.dumps({"report": str(self.directory / "report.json")}))


def _show_merge(console: Any, merge: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"Merged, strategy {merge['strategy']}")
    for column in ("adapter", "method", "weight", "norm of update", "lost by cutting"):
        table.add_column(column, justify="left" if column in ("adapter", "method") else "right")
    for entry in merge["adapters"]:
        table.add_row(
            entry["name"],
            entry["kind"],
            f"{entry['weight']:g}",
            f"{entry['norm']:.3g}",
            f"{entry['lost_by_cutting']:.1%}",
        )
    console.print(table)
    for pair, cosine in merge["cosine"].items():
        console.print(f"cosine of {pair}: {cosine:+.3f}", markup=False)
