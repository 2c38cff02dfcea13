"""front.png: what accuracy costs, drawn; and how costs are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from elastic import plotting
from elastic.searching.objective import Figures

if TYPE_CHECKING:
    from elastic.searching.front import Front


@dataclass(frozen=True)
class Axis:
    """How a cost is written."""

    title: str
    unit: str
    scale: float = 1
    """One unit, in what is measured."""

    def __call__(self, amount: float) -> str:
        return f"{amount / self.scale:.1f} {self.unit}"


COSTS = {
    "prefill_ms": Axis("prefill (time to first token), milliseconds", "ms"),
    "decode_ms": Axis("decode, milliseconds per token", "ms"),
    "memory_mb": Axis("weights and what a prefill holds beside them, MB", "MB"),
    "params": Axis("parameters, millions", "M", 1e6),
    "macs": Axis("multiply-accumulates per token, millions", "M", 1e6),
}
"""What accuracy may be traded against."""


def draw(front: Front, path: Path) -> None:
    """Every evaluated sub-adapter, the front with its intervals on the test split, the best one and
    the full model, over the first cost."""
    figure, axes = plotting.canvas(8, 5)

    drawn = front.costs[0]
    axis = COSTS[drawn]

    def cost(figures: Figures) -> float:
        return float(getattr(figures, drawn)) / axis.scale

    for feasible, colour, label in (
        (True, "#8aa9c9", "evaluated"),
        (False, "#d8d8d8", "over budget"),
    ):
        trials = [one for one in front.trials if one.feasible == feasible]
        if trials:
            axes.scatter(
                [cost(one.figures) for one in trials],
                [100 * one.estimate for one in trials],
                s=22,
                color=colour,
                label=f"{label} (estimate on n={front.full.accuracy_n})",
            )
    xs = [cost(member.figures) for member in front.members]
    ys, bars = plotting.percent_bars(
        (member.test["accuracy"] for member in front.members),
        (member.test["accuracy_interval"] for member in front.members),
    )
    n = front.members[0].test["accuracy_n"]
    axes.errorbar(
        xs, ys, yerr=bars, fmt="o-", color="#1f4e79", capsize=3, linewidth=1.2,
        label=f"front (test, n={n}, 95 % interval)",
    )  # fmt: skip
    best = front.best
    axes.scatter(
        [cost(best.figures)], [100 * best.test["accuracy"]], s=170, zorder=5,
        facecolors="none", edgecolors="#c0392b", linewidths=2, label=f"best: {best.name}",
    )  # fmt: skip
    whole = 100 * best.full_test.accuracy
    axes.plot(
        [cost(front.full)], [whole], marker="*", markersize=13, linestyle="", color="#444444",
        label=f"full model (test), {axis(getattr(front.full, drawn))}",
    )  # fmt: skip
    if drawn in front.limits:
        limit = front.limits[drawn]
        axes.axvline(
            limit / axis.scale, color="#c0392b", linestyle="--", label=f"budget, {axis(limit)}"
        )
    axes.set_xlabel(axis.title)
    axes.set_ylabel("accuracy, %")
    axes.legend(fontsize=8, loc="lower right")
    plotting.save(figure, path)
