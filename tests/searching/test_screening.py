"""What single choices diverge becomes a sum that holds for all of them together."""

import numpy as np
import pytest

from elastic.searching import screening
from elastic.spaces.bound import BoundSpace, Group
from elastic.spaces.dims import Cut

SPACE = BoundSpace(
    tuple(Group(f"layers.{i}.width", "width", (64, 48, 32), (Cut("s", "out"),)) for i in range(6)),
    (),
)
WORTH = np.exp(np.random.default_rng(3).normal(size=6))
ADDED = WORTH[:, None] * np.array([0, 0.3, 1.0])


def diverged(sub, power: float) -> float:
    at = list(SPACE.indices(sub).values())
    return float(ADDED[np.arange(6), at].sum() ** power)


@pytest.mark.parametrize("power", [1.0, 1.25, 2.0])
def test_the_power_that_makes_divergences_a_sum_is_found(power):
    screened = screening.screen(SPACE, lambda sub: diverged(sub, power), quiet=True)
    parts = screening.parts(screened)
    assert np.allclose(parts / parts.sum(), ADDED / ADDED.sum(), atol=0.01)


def test_every_choice_is_asked_alone_and_every_rung_but_the_full_one():
    asked = []

    def ask(sub) -> float:
        asked.append(sub)
        return 1.0

    screening.screen(SPACE, ask, quiet=True)
    assert len(asked) == len(set(asked)) == screening.count(SPACE) == 6 * 2 + 2
    alone, rungs = asked[:12], asked[12:]
    full = SPACE.maximal()
    assert all(sum(sub[g.name] != full[g.name] for g in SPACE) == 1 for sub in alone)
    assert rungs == [point for point in SPACE.ladder() if point != full]


def test_a_smaller_size_never_adds_less():
    screened = screening.screen(SPACE, lambda sub: diverged(sub, 1), quiet=True)
    screened[screening.ALONE][2] = [0.0, 0.9, 0.2]
    assert (np.diff(screening.parts(screened), axis=1) >= 0).all()


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_nothing_is_learnt_of_divergences_that_say_nothing(value):
    assert screening.parts(screening.screen(SPACE, lambda sub: value, quiet=True)) is None
