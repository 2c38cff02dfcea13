"""What every plot shares: a canvas without a display, intervals as error bars, an atomic PNG."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from elastic.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
