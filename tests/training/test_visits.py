"""What a step visits depends on its number and the seed, and on nothing else."""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import ScheduleConfig, StageConfig
from elastic.training.schedule import Schedule, visits
from tests.helpers import tiny

SPACE = tiny.space(heads=True).bind(tiny.llama(), tiny.RANK)
ALL = ["rank", "width", "heads"]
MODES = ["stratified", "uniform"]


def draw(*args, micro_batch: int = 0, **kwargs):
    [sub] = visits(*args, draw=micro_batch, **kwargs)
    return sub


def schedule(*stages: StageConfig, n: int = 10_000) -> Schedule:
    return Schedule(stages, ScheduleConfig(), n)


OPEN = schedule(StageConfig(train_dims=ALL))


@given(st.sampled_from(MODES), st.integers(0, 9999), st.integers(0, 99), st.integers(0, 7))
def test_a_draw_is_a_function_of_seed_step_and_micro_batch(mode, step, seed, micro_batch):
    def once():
        return draw(mode, SPACE, OPEN, step, seed=seed, micro_batch=micro_batch)

    first = once()
    draw(mode, SPACE, OPEN, step + 1, seed=seed)  # nothing in between matters
    assert once() == first == SPACE.check(first)


@pytest.mark.parametrize("mode", MODES)
def test_seed_step_and_micro_batch_all_matter(mode):
    step = 1  # not a maximal turn
    runs = {
        "seed": [draw(mode, SPACE, OPEN, step, seed=s) for s in range(20)],
        "step": [draw(mode, SPACE, OPEN, s, seed=0) for s in range(20)],
        "micro_batch": [draw(mode, SPACE, OPEN, step, seed=0, micro_batch=m) for m in range(20)],
    }
    for name, found in runs.items():
        assert len(set(found)) > 8, name


def test_draws_do_not_depend_on_the_process():
    """A known draw: a change of the generator would break resuming."""
    sub = draw("uniform", SPACE, OPEN, 7, seed=3, micro_batch=1)
    assert sub == SPACE.random(random.Random("3/7/1"))


def test_uniform_draws_are_uniform_and_independent():
    n = 3000
    draws = [draw("uniform", SPACE, OPEN, step, seed=0) for step in range(n)]
    for group in SPACE:
        k = len(group.choices)
        seen = Counter(sub[group.name] for sub in draws)
        chi_square = sum((seen[c] - n / k) ** 2 / (n / k) for c in group.choices)
        assert chi_square < 25  # at most 3 degrees of freedom: p < 2e-5
    pairs = [(a, b) for a in SPACE for b in SPACE if a.name < b.name]
    for a, b in pairs:
        seen = Counter((sub[a.name], sub[b.name]) for sub in draws)
        cells = len(a.choices) * len(b.choices)
        chi_square = sum(
            (seen[x, y] - n / cells) ** 2 / (n / cells) for x in a.choices for y in b.choices
        )
        assert chi_square < 60, (a.name, b.name)  # at most 15 degrees: p < 1e-6


@pytest.mark.parametrize("every", [3, 4])
def test_stratified_is_maximal_every_few_turns_and_reaches_both_ends(every):
    settings = {"seed": 0, "maximal_every": every}
    draws = [draw("stratified", SPACE, OPEN, step, **settings) for step in range(400)]
    assert all(sub == SPACE.maximal() for sub in draws[::every])
    others = [sub for turn, sub in enumerate(draws) if turn % every]
    assert sum(sub == SPACE.maximal() for sub in others) < len(others) / 4
    assert SPACE.minimal() in others
    shares = [share(sub) for sub in others]
    # Independent draws of eight groups hardly leave the middle half; these are spread.
    assert sum(s < 0.25 for s in shares) > len(shares) / 8
    assert sum(s > 0.75 for s in shares) > len(shares) / 8


def share(sub) -> float:
    """Mean position of the ranks, 0 minimal and 1 maximal; a dimension has one target."""
    indices = SPACE.indices(sub)
    ranks = [group for group in SPACE if group.dim == "rank"]
    return sum(1 - indices[g.name] / (len(g.choices) - 1) for g in ranks) / len(ranks)


def test_micro_batches_of_one_step_take_turns_at_the_maximal():
    step = 1
    draws = [draw("stratified", SPACE, OPEN, step, seed=0, micro_batch=m) for m in range(4)]
    assert SPACE.maximal() in draws and len(set(draws)) == 4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [1, 3])
def test_sample_rate_holds_a_draw(mode, n):
    plan = schedule(StageConfig(train_dims=ALL, sample_rate=n))
    draws = [draw(mode, SPACE, plan, step, seed=0) for step in range(12 * n)]
    held = [draws[i : i + n] for i in range(0, len(draws), n)]
    assert all(len(set(group)) == 1 for group in held)
    assert sum(a != b for a, b in itertools.pairwise(held)) >= 10


@pytest.mark.parametrize("mode", MODES)
def test_closed_dimensions_stay_maximal(mode):
    plan = schedule(
        StageConfig(),
        StageConfig(train_dims=["rank"], width_indicator=2),
        StageConfig(train_dims=ALL),
        n=100,
    )
    for step in range(200):
        sub = draw(mode, SPACE, plan, step, seed=0)
        if step < 100:
            assert sub == SPACE.maximal()
            continue
        for group in SPACE:
            allowed = group.choices[:2] if group.dim == "rank" else group.choices[:1]
            assert sub[group.name] in allowed
    seen = {draw(mode, SPACE, plan, step, seed=0) for step in range(100, 200)}
    assert len(seen) > 5


def test_a_sandwich_holds_both_ends_and_one_between():
    for step in range(50):
        first, middle, last = visits("sandwich", SPACE, OPEN, step, seed=0)
        assert (first, last) == (SPACE.maximal(), SPACE.minimal())
        assert middle == SPACE.check(middle)
    closed = schedule(StageConfig())
    assert visits("sandwich", SPACE, closed, 0, seed=0) == (SPACE.maximal(),)
