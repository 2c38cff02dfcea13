"""The additive model finds what is additive, and the front that follows from it."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.latency.additive import Additive, Posterior, cheapest

KINDS = ["rank"] * 6 + ["width"] * 6
SIZES = [[1.0, 0.5]] * 6 + [[1.0, 0.75, 0.5, 0.25]] * 6
COUNTS = np.array([len(sizes) for sizes in SIZES])


def drawn(points: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.random((points, len(COUNTS))) * COUNTS).astype(int)


def effects(seed: int, spread: float = 1.0) -> np.ndarray:
    """A kind's curve times a factor of each group's own."""
    generator = np.random.default_rng(seed)
    found = np.zeros((len(KINDS), 4))
    for group, (kind, sizes) in enumerate(zip(KINDS, SIZES, strict=True)):
        weight = {"rank": 1.0, "width": 4.0}[kind] * np.exp(spread * generator.normal())
        found[group, : len(sizes)] = [-weight * (1 - size) ** 1.5 for size in sizes]
    return found


def values(truth: np.ndarray, choices: np.ndarray) -> np.ndarray:
    return 80 + np.take_along_axis(truth, choices.T, 1).sum(0)


def predicted(found: Posterior, choices: np.ndarray) -> np.ndarray:
    return found.offset - 80 + values(found.effects, choices)


def test_what_is_additive_is_found():
    truth, seen, unseen = effects(0), drawn(200, 1), drawn(100, 2)
    found = Additive(KINDS, SIZES).fit(seen, values(truth, seen), noise=1e-4)
    expected = values(truth, unseen)
    assert np.abs(predicted(found, unseen) - expected).max() < 0.05 * np.ptp(expected)
    assert np.abs(found.effects - truth).max() < 0.1 * np.abs(truth).max()


def test_few_noisy_evaluations_still_rank_what_was_never_seen():
    truth, seen, unseen = effects(0, spread=0.5), drawn(20, 1), drawn(100, 2)
    noisy = values(truth, seen) + np.random.default_rng(3).normal(size=20)
    found = Additive(KINDS, SIZES).fit(seen, noisy, noise=1.0)
    assert np.corrcoef(predicted(found, unseen), values(truth, unseen))[0, 1] > 0.8


def test_the_full_size_has_no_effect_and_missing_choices_none():
    seen = drawn(30, 1)
    found = Additive(KINDS, SIZES).fit(seen, values(effects(0), seen), noise=0.1)
    for table in (found.effects, found.sample(np.random.default_rng(0))):
        assert table.shape == (12, 4)
        assert (table[:, 0] == 0).all() and (table[:6, 2:] == 0).all()


def test_fitted_values_are_nearer_to_the_truth_than_noisy_ones():
    truth, seen = effects(0), drawn(60, 1)
    right = values(truth, seen)
    noisy = right + np.random.default_rng(3).normal(size=60, scale=2.0)
    fitted = Additive(KINDS, SIZES).fit(seen, noisy, noise=4.0).fitted
    assert np.mean((fitted - right) ** 2) < 0.6 * np.mean((noisy - right) ** 2)


def test_what_no_sum_explains_and_no_noise_is_kept():
    """Interactions are real: with precise evaluations the fitted values are the measured ones."""
    seen = drawn(60, 1)
    rough = values(effects(0), seen) + 3 * np.random.default_rng(3).normal(size=60)
    fitted = Additive(KINDS, SIZES).fit(seen, rough, noise=1e-6).fitted
    assert np.abs(fitted - rough).max() < 1e-3
    noisy = Additive(KINDS, SIZES).fit(seen, rough, noise=9.0).fitted
    assert np.abs(noisy - rough).max() > 1


def test_draws_surround_the_mean_and_narrow_with_evidence():
    truth, widths = effects(0), []
    for points in (10, 200):
        seen = drawn(points, 1)
        found = Additive(KINDS, SIZES).fit(seen, values(truth, seen), noise=0.5)
        generator = np.random.default_rng(0)
        draws = np.array([found.sample(generator) for _ in range(2000)])
        error = draws.std(0) / np.sqrt(len(draws))
        assert (np.abs(draws.mean(0) - found.effects) <= 5 * error + 1e-12).all()
        widths.append(draws.std(0).sum())
    assert widths[1] < widths[0] / 2


def test_importances_are_trusted_when_they_tell_the_truth_and_else_dropped():
    truth, seen = effects(0, spread=1.5), drawn(30, 1)
    weights = -truth[np.arange(12), COUNTS - 1]
    noisy = values(truth, seen) + np.random.default_rng(3).normal(size=30, scale=0.3)

    def error(importance) -> tuple[float, float]:
        found = Additive(KINDS, SIZES, importance).fit(seen, noisy, noise=0.09)
        unseen = drawn(200, 5)
        return found.trust, np.abs(predicted(found, unseen) - values(truth, unseen)).mean()

    _, without = error(None)
    trust, told = error(weights)
    assert trust == 1 and told < 0.8 * without
    lies, misled = error(1 / weights)
    assert lies == 0 and misled == pytest.approx(without)


def test_a_fit_does_not_depend_on_the_fits_before_it():
    seen = drawn(50, 1)
    y = values(effects(0), seen) + np.random.default_rng(2).normal(size=50)
    once, often = Additive(KINDS, SIZES), Additive(KINDS, SIZES)
    for points in range(3, 50):
        often.fit(seen[:points], y[:points], noise=1.0)
    assert np.array_equal(once.fit(seen, y, 1.0).effects, often.fit(seen, y, 1.0).effects)


@pytest.mark.parametrize("y", [np.full(12, 0.5), np.arange(12.0)])
def test_evaluations_that_say_nothing(y):
    """All alike, or all of one sub-adapter."""
    same = np.zeros((12, 12), dtype=int)
    for seen in (drawn(12, 0), same):
        found = Additive(KINDS, SIZES).fit(seen, y, noise=1e-3)
        assert np.isfinite(found.effects).all() and np.isfinite(found.fitted).all()
        assert np.isfinite(found.sample(np.random.default_rng(0))).all()


# The front of sums.

TABLES = st.integers(1, 4).flatmap(
    lambda groups: st.tuples(
        *[
            st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=3, max_size=3)
            for _ in range(groups)
        ]
    )
)


def split(table) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.array(table, dtype=float)
    return numbers[..., 0], numbers[..., 1]


@given(TABLES, st.integers(-40, 40))
def test_nothing_as_cheap_gains_more(table, budget):
    gains, costs = split(table)
    rows = np.arange(len(gains))
    chosen = cheapest(gains, costs, budget)
    cost = costs[rows, chosen].sum()
    every = [np.array(each) for each in itertools.product(range(3), repeat=len(gains))]
    if min(costs[rows, each].sum() for each in every) > budget:
        assert cost == costs.min(1).sum()
        return
    assert cost <= budget
    gain = gains[rows, chosen].sum()
    rivals = [each for each in every if costs[rows, each].sum() <= cost]
    assert gain >= max(gains[rows, each].sum() for each in rivals) - 1e-6


@given(TABLES, st.integers(-40, 40))
def test_every_step_of_the_front_is_found(table, budget):
    """No larger λ would do: what is chosen is the best of its price that fits the budget."""
    gains, costs = split(table)
    rows = np.arange(len(gains))
    chosen = cheapest(gains, costs, budget)
    free = costs[rows, gains.argmax(1)].sum()
    if free <= budget:
        assert gains[rows, chosen].sum() == gains.max(1).sum()


def test_choices_that_are_not_there_are_never_taken():
    gains = np.array([[0.0, 5.0, 9.0], [0.0, 1.0, 2.0]])
    costs = np.array([[0.0, -1.0, np.inf], [0.0, -1.0, -2.0]])
    for budget in (1.0, 0.0, -1.5, -3.0, -9.0):
        assert cheapest(gains, costs, budget)[0] != 2


def test_the_order_of_evaluations_changes_nothing():
    """Of a small space most of what evaluations could tell apart is known to be nothing."""
    kinds, sizes = ["rank", "width", "width"], [[8, 4], [64, 32], [64, 32]]
    choices = np.array(list(itertools.product([0, 1], repeat=3)))
    generator = np.random.default_rng(0)
    for _ in range(20):
        accuracies = generator.integers(14, 19, 8) / 30
        fitted = Additive(kinds, sizes).fit(choices, accuracies, noise=0.008).fitted
        order = generator.permutation(8)
        again = Additive(kinds, sizes).fit(choices[order], accuracies[order], noise=0.008).fitted
        np.testing.assert_allclose(again, fitted[order], atol=1e-9)
