"""Drawings from the demo's JSON, as SVG inside the pages: the front, and the sizes by block."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fragments.results import RESULTS

WIDE, HIGH, LEFT, BELOW = 640, 320, 56, 40
CELL = 16


def drawings() -> dict[str, str]:
    """File name to Markdown that holds an SVG."""
    found = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    return {"front.md": front(found["front"]), "sizes.md": sizes(found["front"])}


def svg(width: int, height: int, what: str, parts: Sequence[str]) -> str:
    """A drawing that scales with the page."""
    inside = "\n".join(parts)
    return (
        f'<div class="scroll"><svg class="drawn" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{what}" '
        f'xmlns="http://www.w3.org/2000/svg">\n{inside}\n</svg></div>\n'
    )


def front(members: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy with its interval over measured prefill; the full model as a ring."""
    full = members[0]
    times = [one["measured"]["prefill_ms"] for one in members] + [full["full_prefill_ms"]]
    lowest, most = min(times) * 0.9, max(times) * 1.05
    shares = [share for one in members for share in one["accuracy_interval"]]
    bottom, top = min(shares) - 0.04, max(shares) + 0.04

    def x(time: float) -> float:
        return LEFT + (time - lowest) / (most - lowest) * (WIDE - LEFT - 16)

    def y(share: float) -> float:
        return HIGH - BELOW - (share - bottom) / (top - bottom) * (HIGH - BELOW - 16)

    parts = [
        f'<path class="axis" d="M{LEFT} 8V{HIGH - BELOW}H{WIDE - 8}" />',
        f'<text x="{WIDE / 2:.0f}" y="{HIGH - 6}" text-anchor="middle">prefill, ms</text>',
    ]
    for share in (tenth / 10 for tenth in range(11)):
        if bottom < share < top:
            parts.append(f'<text x="{LEFT - 6}" y="{y(share) + 4:.0f}" text-anchor="end">'
                         f"{share:.0%}</text>")  # fmt: skip
    for time in range(0, int(most), 20):
        if time > lowest:
            parts.append(f'<text x="{x(time):.0f}" y="{HIGH - 22}" text-anchor="middle">{time}'
                         "</text>")  # fmt: skip
    for one in members:
        at, (low, high) = x(one["measured"]["prefill_ms"]), one["accuracy_interval"]
        best = " best" if one["best"] else ""
        parts += [
            f'<path class="interval" d="M{at:.0f} {y(low):.0f}V{y(high):.0f}" />',
            f'<circle class="point{best}" cx="{at:.0f}" cy="{y(one["accuracy"]):.0f}" r="6" />',
            f'<text x="{at + 9:.0f}" y="{y(one["accuracy"]) - 8:.0f}">{one["name"]}</text>',
        ]
    at, share = x(full["full_prefill_ms"]), full["full_accuracy"]
    parts += [
        f'<circle class="full" cx="{at:.0f}" cy="{y(share):.0f}" r="6" />',
        f'<text x="{at - 9:.0f}" y="{y(share) - 10:.0f}" text-anchor="end">full model</text>',
    ]
    return svg(WIDE, HIGH, "Accuracy over prefill of the demo's front", parts)


def sizes(members: Sequence[Mapping[str, Any]]) -> str:
    """A row for every sub-adapter, a cell for every block: how wide its MLP is."""
    names = [name for name in members[0]["sub_adapter"] if name.endswith("mlp_width")]
    most = max(one["sub_adapter"][name] for one in members for name in names)
    parts = []
    for row, one in enumerate(members):
        top = row * (CELL + 4)
        parts.append(f'<text x="{LEFT}" y="{top + 12}" text-anchor="end">{one["name"]}</text>')
        for column, name in enumerate(names):
            size = one["sub_adapter"][name]
            block = re.search(r"\d+", name)
            parts.append(
                f'<rect class="cell" x="{LEFT + 6 + column * CELL}" y="{top}" width="{CELL - 1}" '
                f'height="{CELL}" fill-opacity="{0.08 + 0.92 * size / most:.2f}">'
                f"<title>block {block and block[0]}: {size} of {most}</title></rect>"
            )
    height = len(members) * (CELL + 4) + 16
    last = LEFT + 6 + len(names) * CELL
    parts.append(f'<text x="{LEFT + 6}" y="{height - 3}">block 0</text>')
    parts.append(
        f'<text x="{last}" y="{height - 3}" text-anchor="end">block {len(names) - 1}</text>'
    )
    return svg(last + 4, height, "Width of every MLP of the demo's front", parts)
