"""Prefill and decode latency, measured so that a busy machine cannot fool anybody.

Candidates take turns with a reference, and the reference is measured twice in every round (an A/A
control): when it differs from itself, nothing in that measurement means anything. The clock is
injected, so all of this is tested without timing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from elastic.config import TimingConfig
from elastic.console import track
from elastic.formats.runner import Runner

if TYPE_CHECKING:
    import torch


REFERENCE, CONTROL = "full", "control"


@dataclass(frozen=True)
class Latency:
    """Medians over rounds, milliseconds."""

    prefill_ms: float
    """Time to first token: the whole prompt in parallel, logits at its last position."""
    decode_ms: float
    """Time per further token, at the context of the prompt; 0 where nothing is decoded."""
    spread: float
    """The larger IQR / median of the two."""


@dataclass(frozen=True)
class Bounds:
    """Between which a median ratio to the reference lies, (low, high), with 95 % confidence where
    there are rounds enough: `between`."""

    prefill: tuple[float, float]
    decode: tuple[float, float]


@dataclass(frozen=True)
class Measurement:
    """Latency by name; `full` is the reference."""

    latencies: Mapping[str, Latency]
    control: float
    """How much the reference differs from itself: |ratio - 1|, the larger of prefill and decode,
    the ratio being the median over the rounds of that within one."""
    rounds: int
    tolerance: float
    ratios: Mapping[str, Latency]
    """Of each to the reference: medians over the rounds of the ratio within one, the reference
    being the mean of its two turns. What slows a whole round slows both."""
    bounds: Mapping[str, Bounds]
    """Of those ratios."""

    @property
    def trusted(self) -> bool:
        return self.control <= self.tolerance

    @property
    def full(self) -> Latency:
        return self.latencies[REFERENCE]

    def of(self, name: str, called: str) -> Measurement:
        """Of one alone, beside the reference."""
        return replace(
            self,
            latencies={REFERENCE: self.full, called: self.latencies[name]},
            ratios={REFERENCE: self.ratios[REFERENCE], called: self.ratios[name]},
            bounds={REFERENCE: self.bounds[REFERENCE], called: self.bounds[name]},
        )


def distrust(control: float, tolerance: float) -> str:
    """Why times are not to be trusted: the full model differs from itself by `control`."""
    return (
        f"this machine is too busy to trust these times: the full model differs from itself by "
        f"{control:.1%} (more than {tolerance:.0%})"
    )


def measure(
    runners: Mapping[str, Runner],
    config: TimingConfig,
    *,
    vocabulary: int,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurement:
    """Time every runner; `runners` names the reference "full". `clock` gives seconds.

    One warm-up each, then rounds in which all take turns, each round in the opposite order of the
    last, until every IQR / median is below 0.1 and the control within the tolerance, at most
    `max_rounds`: a busy machine takes more of them, and all count. Where runners have threads of
    their own, a turn begins with a prefill that is not timed: those of the runner before it may
    still be spinning.
    """
    turns = {**runners, CONTROL: runners[REFERENCE]}
    generator = np.random.default_rng(seed)
    shape = (config.batch, config.prompt_tokens)
    prompt = generator.integers(vocabulary, size=shape, dtype=np.int64)
    token = prompt[:, :1]
    prefill: dict[str, list[float]] = {name: [] for name in turns}
    decode: dict[str, list[float]] = {name: [] for name in turns}

    def once(runner: Runner) -> tuple[float, float]:
        if runner.own_threads:
            runner.prefill(prompt)
        start = clock()
        runner.prefill(prompt)
        middle = clock()
        for _ in range(config.new_tokens):
            runner.decode(token)
        end = clock() if config.new_tokens else middle
        return (middle - start) * 1e3, (end - middle) * 1e3 / max(1, config.new_tokens)

    for runner in runners.values():
        once(runner)
    names = list(turns)
    for round_number in track(range(1, config.max_rounds + 1), "rounds, at most"):
        for name in names if round_number % 2 else reversed(names):
            first, each = once(turns[name])
            prefill[name].append(first)
            decode[name].append(each)
        steady = all(_spread(times) < 0.1 for kind in (prefill, decode) for times in kind.values())
        control = max(_differs(prefill), _differs(decode))
        if round_number >= config.rounds and steady and control <= config.tolerance:
            break
    latencies = {
        name: Latency(
            float(np.median(prefill[name])),
            float(np.median(decode[name])),
            max(_spread(prefill[name]), _spread(decode[name])),
        )
        for name in turns
    }
    within = {
        name: (_within_rounds(prefill, name), _within_rounds(decode, name)) for name in runners
    }
    ratios = {
        name: Latency(float(np.median(first)), float(np.median(each)), latencies[name].spread)
        for name, (first, each) in within.items()
    }
    bounds = {name: Bounds(between(first), between(each)) for name, (first, each) in within.items()}
    latencies.pop(CONTROL)
    return Measurement(latencies, control, round_number, config.tolerance, ratios, bounds)


def clock_of(device: torch.device) -> Callable[[], float]:
    """What to `measure` a model on this device with."""
    if device.type != "cuda":
        return time.perf_counter
    from elastic.latency.cuda import CudaClock

    return CudaClock(device)


def state_of(device: torch.device) -> dict[str, float | str] | None:
    """The clocks of a GPU at this moment; None on a CPU."""
    if device.type != "cuda":
        return None
    from elastic.latency.cuda import state

    return state(device)


def _within_rounds(times: Mapping[str, list[float]], name: str) -> np.ndarray:
    """(rounds,): one's time over the mean of both turns of the reference."""
    full: np.ndarray = np.mean([times[REFERENCE], times[CONTROL]], 0)
    if name == REFERENCE or not full.any():
        return np.ones(len(times[name]))
    own: np.ndarray = np.array(times[name]) / full
    return own


def _differs(times: Mapping[str, list[float]]) -> float:
    """By how much the reference differs from itself, in parts of it; by nothing where nothing is
    timed."""
    again, full = np.array(times[CONTROL]), np.array(times[REFERENCE])
    return abs(float(np.median(again / full)) - 1) if full.all() else 0.0


def between(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The narrowest pair of ordered values with the median of what they were drawn from between
    them in 95 % of cases, whatever its distribution (the sign test's interval; Conover 1999). Of
    five or fewer values, the smallest and the largest: 94 % for five, 75 % for three."""
    ordered = sorted(float(value) for value in values)
    n, left = len(ordered), 0  # so many are outside at either end
    while 2 * sum(math.comb(n, k) for k in range(left + 2)) <= 0.05 * 2**n:
        left += 1
    return ordered[left], ordered[n - 1 - left]


def _spread(times: list[float]) -> float:
    low, median, high = np.percentile(times, (25, 50, 75))
    return float((high - low) / median) if median else 0.0


def per_second(batch: int, decode_ms: float) -> float:
    """Tokens of all sequences; 0 where nothing is decoded."""
    return 1000 * batch / decode_ms if decode_ms else 0.0
