"""Accuracies correct what divergences say, as far as they can."""

import numpy as np
import pytest

from elastic.searching import joint
from elastic.searching.joint import Joint
from elastic.searching.sampler import sampling_variance

GROUPS, CHOICES = 24, 4
KINDS = ["width"] * 12 + ["heads"] * 12


@pytest.fixture
def world():
    """Parts as screening found them, what they truly are (heads worth twice as much), and
    accuracies of 60 points."""
    generator = np.random.default_rng(0)
    worth = np.exp(generator.normal(0, 0.7, GROUPS))
    parts = worth[:, None] * np.linspace(0, 1, CHOICES) ** 1.4
    factor = np.exp(generator.normal(0, 0.1, GROUPS)) * np.repeat([0.7, 1.4], 12)
    truth = parts * factor[:, None]
    truth /= truth.max(1).sum()
    level = generator.integers(0, CHOICES, 60)
    at = np.clip(level[:, None] + generator.integers(-1, 2, (60, GROUPS)), 0, CHOICES - 1)
    lost = np.take_along_axis(truth, at.T, 1).sum(0)
    return parts / parts.max(1).sum(), truth, at, 0.8 - 0.3 * lost**1.2


def _wrong(effects: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(effects / effects.sum() - truth / truth.sum()).sum())


def test_what_accuracies_say_moves_the_parts_towards_the_truth(world):
    parts, truth, at, accuracies = world
    belief = Joint(KINDS, parts).fit(at, accuracies, 1e-5)
    assert _wrong(belief.effects, truth) < 0.6 * _wrong(parts, truth)
    assert (belief.effects <= 0).all()


def test_points_that_were_not_seen_are_predicted(world):
    parts, _, at, accuracies = world
    belief = Joint(KINDS, parts).fit(at[:40], accuracies[:40], 1e-5)
    left = accuracies[40:]
    wrong = np.square(belief.predict(at[40:]) - left).sum()
    assert 1 - wrong / np.square(left - left.mean()).sum() > 0.98


def test_noise_is_taken_off(world):
    parts, _, at, accuracies = world
    noise = np.random.default_rng(1).normal(0, 0.03, len(at))
    fitted = Joint(KINDS, parts).fit(at, accuracies + noise, 0.03**2).fitted
    assert np.std(fitted - accuracies) < 0.5 * np.std(noise)


def test_samples_lie_around_the_belief_and_narrow_with_evaluations(world, monkeypatch):
    monkeypatch.setattr(joint, "SPREADS", (0.3,))
    parts, _, at, accuracies = world
    spreads = []
    for count in (6, 60):
        belief = Joint(KINDS, parts).fit(at[:count], accuracies[:count], 1e-4)
        generator = np.random.default_rng(2)
        drawn = np.array([belief.sample(generator) for _ in range(200)])
        # Which kind matters more; how much both matter together is not the sample's to say.
        heads = drawn[:, 12:].min(2).sum(1) / drawn.min(2).sum(1)
        mean = belief.effects[12:].min(1).sum() / belief.effects.min(1).sum()
        assert np.isclose(heads.mean(), mean, rtol=0.1)
        spreads.append(float(heads.std()))
    assert spreads[1] < 0.5 * spreads[0]


def test_two_extremes_are_enough_to_begin(world):
    parts, _, _, _ = world
    ends = np.array([[0] * GROUPS, [CHOICES - 1] * GROUPS])
    belief = Joint(KINDS, parts).fit(ends, np.array([0.8, 0.5]), 1e-4)
    assert np.isclose(belief.effects.min(1).sum(), -0.3, rtol=0.05)
    assert np.allclose(belief.predict(ends), [0.8, 0.5], atol=0.01)


@pytest.mark.parametrize("evaluations", [1, 3])
@pytest.mark.parametrize("accuracy", [0.0, 0.5, 1.0])
def test_of_equal_points_something_is_believed(world, evaluations, accuracy):
    """A search may be interrupted after any first one."""
    parts, _, _, _ = world
    for choice in range(CHOICES):
        at = np.full((evaluations, GROUPS), choice)
        values = np.full(evaluations, accuracy)
        belief = Joint(KINDS, parts).fit(at, values, sampling_variance(values, 50))
        assert np.allclose(belief.fitted, accuracy, atol=0.05)
        assert np.isfinite(belief.effects).all() and (belief.effects <= 0).all()


def test_where_accuracies_rise_by_chance_divergences_decide(world):
    """All are equally good; the noise of many draws says that small ones are better."""
    parts, _, at, _ = world
    lost = np.take_along_axis(parts, at.T, 1).sum(0)
    noises = np.random.default_rng(2).normal(0, 0.03, (40, len(at)))
    rising = [noise for noise in noises if np.corrcoef(noise, lost)[0, 1] > 0]
    assert len(rising) > 10
    for noise in rising:
        belief = Joint(KINDS, parts).fit(at, 0.8 + noise, 0.03**2)
        assert belief.effects.min(1).sum() < 0
        assert np.corrcoef(belief.fitted, lost)[0, 1] < -0.9
        assert np.corrcoef(belief.predict(at), lost)[0, 1] < -0.9


@pytest.mark.parametrize("rise", [0.02, 0.05])
def test_more_accuracies_of_the_same_examples_do_not_make_chance_a_truth(world, rise):
    """The examples that were drawn like the small ones: every accuracy says so."""
    parts, _, at, _ = world
    lost = np.take_along_axis(parts, at.T, 1).sum(0)
    belief = Joint(KINDS, parts).fit(at, 0.8 + rise * lost, 0.03**2)
    assert belief.effects.min(1).sum() < -0.4 * 0.03
    assert np.corrcoef(belief.fitted, lost)[0, 1] < -0.9
    assert np.corrcoef(belief.predict(at), lost)[0, 1] < -0.9


def test_where_accuracies_truly_rise_the_small_ones_are_best(world):
    """By ten standard errors of one."""
    parts, _, at, _ = world
    lost = np.take_along_axis(parts, at.T, 1).sum(0)
    truth = 0.7 + 0.1 * lost
    noise = np.random.default_rng(2).normal(0, 0.01, len(at))
    fitted = Joint(KINDS, parts).fit(at, truth + noise, 0.01**2).fitted
    assert np.sqrt(np.square(fitted - truth).mean()) < 0.012
    assert truth.max() - truth[fitted.argmax()] < 0.01


def test_a_gain_by_being_cut_is_believed_where_it_is_no_chance(world):
    """Of so many examples that it is ten standard errors; the middle is best."""
    parts, _, at, _ = world
    lost = np.take_along_axis(parts, at.T, 1).sum(0)
    truth = 0.6 + 0.05 * 4 * lost * (1 - lost)
    noise = np.random.default_rng(3).normal(0, 0.005, len(at))
    fitted = Joint(KINDS, parts).fit(at, truth + noise, 0.005**2).fitted
    assert np.sqrt(np.square(fitted - truth).mean()) < 0.006
    assert truth.max() - truth[fitted.argmax()] < 0.012
