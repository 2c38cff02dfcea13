"""What every choice of every group alone makes of the answers, before the first trial.

The divergence from the full model is of few examples and shows what no accuracy on as few would.
Divergences do not add up, powers of them do: the power with which those of single groups sum to
those of the ladder's rungs, all groups cut at once, is found by asking the rungs. (Puzzle adds up
the divergences themselves: Bercovich et al. 2024, arXiv 2411.19146.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from elastic.config import SearchConfig
from elastic.console import say, track
from elastic.files import tag
from elastic.searching.objective import Objective
from elastic.spaces.bound import Candidate, Point, Space

if TYPE_CHECKING:
    import optuna

LONGEST, FEWEST = 25, 4
"""Accuracies that screening may take as long as, however many trials there will be, and examples
below which it is not worth it."""
POWERS = np.linspace(0.3, 1.5, 25)
ALONE, TOGETHER = "alone", "together"
_KEPT = "divergence "
"""Of what a study keeps, the start of the names of these."""


def rows_of(config: SearchConfig, objective: Objective) -> int:
    """Examples of every divergence; 0 where nothing is tried alone, or would take too long."""
    if config.sampler != "additive":
        return 0
    room = LONGEST * len(objective.examples)
    rows = min(config.screen, room // count(objective.space))
    return rows if rows >= min(config.screen, FEWEST) else 0


def screened(study: optuna.Study, objective: Objective, rows: int) -> dict[str, Any]:
    """`screen` of the objective's divergences on so many examples. The study keeps each as it
    comes, so that what a kill ends goes on; it is of one super-adapter, task and settings."""
    kept = {name: value for name, value in study.user_attrs.items() if name.startswith(_KEPT)}

    def divergence(candidate: Candidate) -> float:
        name = _KEPT + tag(f"{candidate} {rows}")
        if name not in kept:
            kept[name] = objective.divergence(candidate, rows)
            study.set_user_attr(name, kept[name])
        return float(kept[name])

    before = f", of which {len(kept)} were tried before" if kept else ""
    choices = count(objective.space)
    say(f"Trying {choices} choices alone{before}, on {rows} validation examples each")
    return screen(objective.space, divergence)


def screen(
    space: Space[Point], divergence: Callable[[Point], float], *, quiet: bool = False
) -> dict[str, Any]:
    """For JSON: the divergence of every point that has one group alone cut, (groups, choices), and
    those of the rungs of the ladder as pairs of indices and divergence."""
    full = space.indices(space.maximal())
    names = list(full)
    rungs = [point for point in space.ladder() if point != space.maximal()]
    asked = [(group, choice) for group in space for choice in range(1, len(group.choices))]
    alone = {group.name: [0.0] for group in space}
    for group, choice in track(asked, "each choice alone", quiet=quiet):
        alone[group.name].append(divergence(space.at({**full, group.name: choice})))
    together = [[[space.indices(rung)[name] for name in names], divergence(rung)] for rung in rungs]
    return {ALONE: list(alone.values()), TOGETHER: together}


def count(space: Space[Any]) -> int:
    """How many divergences `screen` asks for."""
    return sum(len(group.choices) - 1 for group in space) + len(space.ladder()) - 1


def parts(screened: Mapping[str, Any]) -> np.ndarray | None:
    """(groups, choices): what every choice adds to the sum of which a divergence is a power; 0
    where there is no choice. A smaller size never adds less. None where nothing diverged, or what
    did is no number."""
    alone: Sequence[Sequence[float]] = screened[ALONE]
    found = np.zeros((len(alone), max(map(len, alone))))
    for row, own in zip(found, alone, strict=True):
        row[: len(own)] = np.maximum.accumulate(own)
    at = np.array([at for at, _ in screened[TOGETHER]])
    together = np.array([value for _, value in screened[TOGETHER]])
    if not np.isfinite(found).all() or not found.any():
        return None
    single = np.take_along_axis(found, at.T, 1).T  # (rungs, groups)
    there = (together > 0) & np.isfinite(together) & (single.sum(1) > 0)
    if not there.any():
        return found
    wrong = [
        np.square(np.log((single[there] ** power).sum(1)) / power - np.log(together[there])).mean()
        for power in POWERS
    ]
    summed: np.ndarray = found ** POWERS[int(np.argmin(wrong))]
    return summed
