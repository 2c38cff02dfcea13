"""What every plot shares: a canvas without a display, intervals as error bars, an atomic PNG; and
what is said and done where the libraries that draw are not installed."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from elastic.errors import MissingExtra
from elastic.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def cannot_draw() -> str | None:
    """What is missing, and how to get it; None where plots and pages are drawn."""
    for package in ("matplotlib", "plotly"):
        if find_spec(package) is None:
            return str(MissingExtra(package, "plots", "drawing"))
    return None


def draws(file: Path) -> bool:
    """Whether `file` can be drawn. If not, an earlier one goes: it would show what is no longer
    true."""
    if cannot_draw():
        file.unlink(missing_ok=True)
        return False
    return True


def where_drawn(files: str) -> str:
    """One line for the end of a command: where the pictures are, or why there are none."""
    reason = cannot_draw()
    return f"No plot was drawn: {reason}, then run this again" if reason else f"Plot: {files}"


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of this size in inches, and its one pair of axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    return figure, axes


def percent_bars(
    fractions: Iterable[float], intervals: Iterable[Sequence[float]]
) -> tuple[list[float], list[list[float]]]:
    """Heights in percent, and how far each interval reaches below and above (`yerr`).

    Rounding may put a bound of 0 or 1 a hair inside its fraction; matplotlib refuses that.
    """
    heights = [100 * fraction for fraction in fractions]
    bounds = [(100 * low, 100 * high) for low, high in intervals]
    below = [max(0.0, y - low) for y, (low, _) in zip(heights, bounds, strict=True)]
    above = [max(0.0, high - y) for y, (_, high) in zip(heights, bounds, strict=True)]
    return heights, [below, above]


def save(figure: Figure, path: Path) -> None:
    """As PNG, in one step."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    write_bytes(path, buffer.getvalue())
