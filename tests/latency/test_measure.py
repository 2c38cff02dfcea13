"""What is measured follows from what the clock says, and a busy machine is found out. No test
here waits: a fake machine moves the clock."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import TimingConfig
from elastic.formats.runner import TorchRunner
from elastic.latency.measure import between, distrust, measure
from tests.helpers import tiny
from tests.helpers.clock import FakeRunner, Machine, drive

VOCABULARY = 50


def timing(**settings) -> TimingConfig:
    return TimingConfig(**(dict(prompt_tokens=3, new_tokens=2, rounds=4, max_rounds=4) | settings))


def run(machine, runners, config=None, **settings):
    named = {runner.name: runner for runner in runners}
    return measure(
        named, config or timing(), vocabulary=VOCABULARY, clock=machine.clock, **settings
    )


def test_times_are_what_the_clock_says():
    machine = Machine()
    full = FakeRunner(machine, "full", prefill=0.040, decode=0.008)
    half = FakeRunner(machine, "half", prefill=0.020, decode=0.002)
    found = run(machine, [full, half], timing(new_tokens=5))
    assert found.full.prefill_ms == pytest.approx(40)
    assert found.full.decode_ms == pytest.approx(8)  # per token, not per round
    assert found.latencies["half"].prefill_ms == pytest.approx(20)
    assert found.latencies["half"].decode_ms == pytest.approx(2)
    assert found.ratios["half"].prefill_ms == pytest.approx(0.5)
    assert found.ratios["half"].decode_ms == pytest.approx(0.25)
    assert found.control == pytest.approx(0)
    assert found.trusted
    assert set(found.latencies) == {"full", "half"}


def test_latency_is_the_median_over_rounds_without_the_warm_up():
    factors = [100.0, 1.0, 7.0, 2.0, 3.0, 50.0]  # the first is the warm-up
    machine = Machine()
    full = FakeRunner(machine, "full", 0.010, 0.010)
    other = FakeRunner(machine, "other", 0.010, 0.004, lambda own, _: factors[own])
    found = run(machine, [full, other], timing(rounds=5, max_rounds=5)).latencies["other"]
    low, median, high = np.percentile(factors[1:], (25, 50, 75))
    assert found.prefill_ms == pytest.approx(10 * median)
    assert found.decode_ms == pytest.approx(4 * median)
    assert found.spread == pytest.approx((high - low) / median)


def test_everybody_takes_a_turn_in_every_round_each_in_the_opposite_order():
    machine = Machine()
    runners = [FakeRunner(machine, name, 0.01, 0.01) for name in ("full", "a", "b")]
    run(machine, runners, timing(rounds=3, max_rounds=3))
    there, back = ["full", "a", "b", "full"], ["full", "b", "a", "full"]
    assert machine.log == ["full", "a", "b", *there, *back, *there]


def test_the_control_is_the_reference_measured_twice_in_a_round():
    # Turns of the reference: 0 warms up, then reference and control change places every round.
    def slow_as_control(own, _):
        return 1.2 if own % 4 in (2, 3) else 1.0

    machine = Machine()
    full = FakeRunner(machine, "full", 0.010, 0.010, slow_as_control)
    found = run(machine, [full], timing(tolerance=0.19))
    assert found.full.prefill_ms == pytest.approx(10)
    assert found.control == pytest.approx(0.2)
    assert not found.trusted
    said = distrust(found.control, found.tolerance)
    assert "20.0%" in said and "19%" in said


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_either_time_can_fail_the_control(kind):
    class OneKind(FakeRunner):
        def prefill(self, input_ids):
            super().prefill(input_ids)
            if self.warming:
                return
            extra = self.turns % 4 in (3, 0) and self.turns > 1
            self.seconds = {"prefill": 0.01, "decode": 0.01}
            if extra and kind == "decode":
                self.seconds["decode"] = 0.02
            if extra and kind == "prefill":
                self.machine.now += 0.01

    machine = Machine()
    found = run(machine, [OneKind(machine, "full", 0.01, 0.01)])
    assert found.control == pytest.approx(1.0)
    assert not found.trusted


@pytest.mark.parametrize("tolerance, trusted", [(0.049, False), (0.051, True)])
def test_tolerance_decides_what_is_trusted(tolerance, trusted):
    machine = Machine()
    full = FakeRunner(
        machine, "full", 0.010, 0.010, lambda own, _: 1.05 if own % 4 in (2, 3) else 1.0
    )
    found = run(machine, [full], timing(tolerance=tolerance))
    assert found.trusted is trusted


@pytest.mark.parametrize("names", list(itertools.permutations(["full", "a", "b"])))
def test_a_machine_that_slows_down_favours_nobody(names):
    """Speed falls by 5 % of the first turn's time with every turn. Opposite orders cancel it."""
    machine = Machine()
    seconds = {"full": 0.010, "a": 0.010, "b": 0.005}
    runners = [
        FakeRunner(machine, name, seconds[name], seconds[name], lambda _, turn: 1 + 0.05 * turn)
        for name in names
    ]
    found = run(machine, runners, timing(rounds=6, max_rounds=6))
    assert found.control == pytest.approx(0, abs=0.01)
    # Within a round the slope cancels but for what it is of a turn's own time.
    assert found.ratios["a"].prefill_ms == pytest.approx(1, rel=0.01)
    assert found.ratios["a"].decode_ms == pytest.approx(1, rel=0.01)
    assert found.ratios["b"].prefill_ms == pytest.approx(0.5, rel=0.01)
    assert found.ratios["b"].decode_ms == pytest.approx(0.5, rel=0.01)
    low, high = found.bounds["b"].prefill
    assert low <= found.ratios["b"].prefill_ms <= high < 0.6


def test_what_slows_a_whole_round_leaves_the_ratio_alone():
    """Five of eight rounds are slower, each in its own way: medians alone would be off."""
    machine = Machine()
    slow = [1.0, 1.0, 3.0, 1.7, 1.0, 2.2, 5.0, 1.3]

    def of(turns_per_round):
        return lambda own, _: 1.0 if own == 0 else slow[(own - 1) // turns_per_round]

    runners = [
        FakeRunner(machine, "full", 0.010, 0.004, of(2)),  # as itself and as the control
        FakeRunner(machine, "a", 0.007, 0.003, of(1)),
    ]
    found = run(machine, runners, timing(rounds=8, max_rounds=8))
    assert found.ratios["a"].prefill_ms == pytest.approx(0.7)
    assert found.ratios["a"].decode_ms == pytest.approx(0.75)
    assert found.ratios["full"].prefill_ms == found.ratios["full"].decode_ms == 1


def test_a_ratio_does_not_depend_on_when_it_was_measured():
    def ratio(speed):
        machine = Machine()
        runners = [
            FakeRunner(machine, "full", 0.010, 0.004, lambda *_: speed),
            FakeRunner(machine, "a", 0.007, 0.003, lambda *_: speed),
        ]
        return run(machine, runners).ratios["a"]

    early, late = ratio(1.0), ratio(3.0)
    assert early.prefill_ms == pytest.approx(late.prefill_ms)
    assert early.decode_ms == pytest.approx(late.decode_ms)


def rounds_taken(factors, **settings) -> int:
    """Rounds until the other runner, whose n-th turn takes factors[n], was steady."""
    machine = Machine()
    full = FakeRunner(machine, "full", 0.010, 0.010)
    other = FakeRunner(machine, "other", 0.010, 0.010, lambda own, _: factors(own))
    found = run(machine, [full, other], timing(**settings))
    assert other.turns == found.rounds + 1
    return found.rounds


def test_a_steady_machine_takes_the_least_rounds():
    assert rounds_taken(lambda own: 1.0, rounds=3, max_rounds=20) == 3


def test_a_restless_machine_takes_the_most_rounds():
    assert rounds_taken(lambda own: 1.0 + own % 2, rounds=3, max_rounds=11) == 11


def test_rounds_end_once_the_spread_is_small():
    times = [1.0, 2.0, 3.0, 1.0, *[1.0] * 30]  # restless in the first rounds

    def steady(count):
        low, median, high = np.percentile(times[1 : 1 + count], (25, 50, 75))
        return (high - low) / median < 0.1

    expected = next(count for count in range(3, 31) if steady(count))
    assert 3 < expected < 20
    assert rounds_taken(lambda own: times[own], rounds=3, max_rounds=20) == expected


@pytest.mark.parametrize(("most", "rounds", "trusted"), [(20, 9, True), (7, 7, False)])
def test_a_control_that_differs_takes_more_rounds_and_all_of_them_count(most, rounds, trusted):
    """The reference is slower as its own control in the first four rounds; with the ninth they are
    the fewer ones."""

    def slow(own, _):
        return 1.08 if own % 4 in (2, 3) and own < 8 else 1.0

    machine = Machine()
    runners = [
        FakeRunner(machine, "full", 0.010, 0.010, slow),
        FakeRunner(machine, "a", 0.005, 0.005, lambda own, _: 1.05 if own < 6 else 1.0),
    ]
    found = run(machine, runners, timing(rounds=3, max_rounds=most))
    assert (found.rounds, found.trusted) == (rounds, trusted)
    assert found.latencies["a"].prefill_ms == pytest.approx(5.25)  # five of all rounds


def test_prompt_batch_and_tokens_reach_the_runner():
    machine = Machine()
    runners = [FakeRunner(machine, name, 0.01, 0.01) for name in ("full", "a")]
    config = timing(batch=3, prompt_tokens=11, new_tokens=5, rounds=2, max_rounds=2)
    run(machine, runners, config, seed=4)
    for runner in runners:
        for prompt in runner.prompts:
            assert prompt.shape == (3, 11) and prompt.dtype == np.int64
            assert prompt.min() >= 0 and prompt.max() < VOCABULARY
            np.testing.assert_array_equal(prompt, runners[0].prompts[0])  # the same for all
        assert len(runner.tokens) == 5 * len(runner.prompts)
        assert all(token.shape == (3, 1) for token in runner.tokens)
    assert len(np.unique(runners[0].prompts[0])) > 5  # not one token over and over

    first = runners[0].prompts[0]
    for seed, same in ((4, True), (5, False)):
        again = FakeRunner(machine, "full", 0.01, 0.01)
        run(machine, [again], config, seed=seed)
        assert np.array_equal(again.prompts[0], first) is same


@pytest.mark.parametrize("prompt", [1, 6])
@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_and_decode_equal_one_forward_pass(tiny_llama, prompt, batch):
    ids = tiny.tokens(batch, prompt + 4)
    expected = tiny.logits(tiny_llama, ids)[:, prompt - 1 :].numpy()
    found = drive(TorchRunner(tiny_llama), ids.numpy(), prompt)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_prefill_forgets_the_past(tiny_llama):
    runner = TorchRunner(tiny_llama)
    ids, other = tiny.tokens(2, 8).numpy(), tiny.tokens(2, 9, seed=1).numpy()
    first = drive(runner, ids, 5)
    drive(runner, other, 3)
    np.testing.assert_array_equal(drive(runner, ids, 5), first)
    drive(runner, other[:1], 3)  # another batch size leaves nothing behind either
    np.testing.assert_array_equal(drive(runner, ids, 5), first)


def test_narrow_logits_come_back_as_float32():
    model = tiny.llama(dtype=torch.bfloat16)
    assert TorchRunner(model).prefill(tiny.tokens(1, 4).numpy()).dtype == np.float32


# Bounds of a ratio


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=40))
def test_bounds_are_the_sign_tests(values):
    low, high = between(values)
    ordered, n = sorted(values), len(values)
    outside = ordered.index(low)
    assert low <= np.median(values) <= high
    assert high == ordered[n - 1 - outside]
    if n >= 6:
        chance = [math.comb(n, k) / 2**n for k in range(n)]
        cut = max(k for k in range(n // 2) if 2 * sum(chance[: k + 1]) <= 0.05)
        assert (low, high) == (ordered[cut], ordered[n - 1 - cut])
    else:
        assert (low, high) == (ordered[0], ordered[-1])


def test_the_bounds_of_known_numbers_of_rounds():
    # From tables of the sign test: of 6 rounds all, of 9 without one at either end, of 20 five.
    for n, outside in ((3, 0), (6, 0), (9, 1), (20, 5)):
        assert between(range(n)) == (outside, n - 1 - outside)


def test_runners_on_the_threads_of_the_process_are_timed_at_once():
    class OnePool(FakeRunner):
        own_threads = False

        def prefill(self, input_ids):
            self.warming = True  # so that this one is counted
            super().prefill(input_ids)

    machine = Machine()
    runners = [OnePool(machine, "full", 0.010, 0.010), OnePool(machine, "half", 0.005, 0.010)]
    found = run(machine, runners)
    assert found.full.prefill_ms == pytest.approx(10)
    assert found.ratios["half"].prefill_ms == pytest.approx(0.5)
    assert len(runners[1].prompts) == 1 + found.rounds  # the warm-up, and one in every turn
