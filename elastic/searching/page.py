"""report.html: the search on one self-contained page, to look at and to choose from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from elastic import plotting
from elastic.files import write_text
from elastic.latency.cost_table import kinds
from elastic.latency.target import LATENCIES
from elastic.searching.drawing import COSTS
from elastic.searching.front import Evaluated, Front, Member
from elastic.searching.pareto import hypervolume


def write_page(front: Front) -> None:
    """Draw the front, every sub-adapter's sizes, the hypervolume and what groups cost; nothing
    where the extra `plots` is not installed."""
    if not plotting.draws(front.run.report):
        return
    from plotly.offline import get_plotlyjs

    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # No text of a search opens or ends an element, and none stands where the library is put.
    data = json.dumps(_data(front), allow_nan=False).replace("<", "\\u003c")
    page = template.replace("/*PLOTLY*/", get_plotlyjs(), 1).replace("/*DATA*/", data, 1)
    write_text(front.run.report, page)


def _data(front: Front) -> dict[str, Any]:
    space, head = front.space, front.space.vocabulary
    numbers = {one.candidate: number for number, one in enumerate(front.trials)}
    names = {member.candidate: member.name for member in front.members}
    of_kind = dict.fromkeys(kinds(space))
    blocks = dict.fromkeys(_block(group.name) for group in space)
    full = front.full
    return {
        "title": f"{front.run.path.resolve().name}: {len(front.trials)} sub-adapters",
        "about": (
            f"Full model: accuracy {full.accuracy:.1%} on {full.accuracy_n} validation examples "
            f"and {front.best.full_test.accuracy:.1%} on test, prefill {full.prefill_ms:.1f} ms"
            + (f", decode {full.decode_ms:.1f} ms. " if full.decode_ms else ". ")
            + "Points are "
            "estimates: measured accuracies less their noise. Hover or click to see one."
        ),
        "tables": [timetable.describe() for timetable in front.timetables.values()],
        "precisions": len(front.timetables) > 1,
        "decodes": full.decode_ms > 0,
        "cost": front.costs[0],
        "axis": asdict(COSTS[front.costs[0]]),
        "limits": dict(front.limits),
        "test_n": front.members[0].test["accuracy_n"],
        "kinds": list(of_kind),
        "blocks": list(blocks),
        "groups": {
            f"{kind} {_block(group.name)}": {"name": group.name, "full": group.choices[0]}
            for kind, group in zip(kinds(space), space, strict=True)
        },
        "names": [group.name for group in space],
        "head": head and {"group": head.name, "tokens": head.choices[0]},
        "trials": [
            {
                **one.figures.numbers(),
                "estimate": one.estimate,
                "feasible": one.feasible,
                "name": names.get(one.candidate),
                "weights": front.weights(one),
                "compress": one.candidate.compress,
                "sizes": [size for _, size in one.sub_adapter.choices],
            }
            for one in front.trials
        ],
        "members": [
            {
                "name": member.name,
                "best": member.best,
                "trial": numbers[member.candidate],
                "accuracy": member.test["accuracy"],
                "interval": list(member.test["accuracy_interval"]),
                "from_full": list(_flat(member.beside_full)),
                "before": member.recovery and member.recovery["before"]["accuracy"],
                "measured": member.measured and asdict(member.measured),
                "head": _says(member) if head else None,
            }
            for member in front.members
        ],
        "checks": list(_checks(front)),
        "volumes": _volumes(front.trials, front.costs[0]),
        "costs": [  # points of accuracy that the smallest choice is believed to cost, by group
            -100 * float(effect[len(group.choices) - 1])
            for group, effect in zip(space, front.effects, strict=True)
        ],
    }


def _says(member: Member) -> dict[str, Any]:
    """What of the test answers its head can say: the share of their tokens, how many they are and
    how many it cannot."""
    if (told := member.sayable) is None:  # all tokens
        return {"share": 1.0, "answers": member.test["accuracy_n"], "unsayable": 0}
    return {"share": told.share, "answers": told.answers, "unsayable": told.unsayable}


def _flat(gap: tuple[float, tuple[float, float]]) -> tuple[float, float, float]:
    """A difference and the ends of its interval."""
    return gap[0], *gap[1]


def _block(name: str) -> str:
    """What tells a group from others of its kind."""
    return " ".join(part for part in name.split(".") if part.isdigit()) or "all"


def _volumes(trials: Sequence[Evaluated], cost: str) -> list[float]:
    """Of accuracy and the cost that is drawn, after every evaluation, in parts of the last one's;
    the worst figures are the reference."""
    points = [(getattr(one.figures, cost), -one.estimate) for one in trials]
    worst = tuple(np.max(points, 0))
    found = [hypervolume(points[: n + 1], worst) for n in range(len(points))]
    return [volume / (found[-1] or 1.0) for volume in found]


def _checks(front: Front) -> Iterator[dict[str, Any]]:
    """What the table was not told: sub-adapters kept from it, and the front as it was measured. Of
    the latency that is traded, else of prefill."""
    metric = next((cost for cost in front.costs if cost in LATENCIES), LATENCIES[0])
    for timetable in front.timetables.values():
        for timed in timetable.unseen:
            predicted = timetable(timed.sub_adapter)[metric]
            measured = timed.values[metric]
            yield {"predicted": predicted, "measured": measured, "what": "kept from the table"}
    for member in front.members:
        if member.measured:
            predicted, measured = (getattr(x, metric) for x in (member.figures, member.measured))
            yield {"predicted": predicted, "measured": measured, "what": member.name}
