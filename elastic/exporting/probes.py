"""What the supernet computes for a few prompts, and how far a written model is from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from elastic.console import track
from elastic.data.encoding import encode_text, prompt_ids
from elastic.data.task import Example
from elastic.errors import ExportError
from elastic.formats.runner import Runner, runner_of
from elastic.models.kinds import Kind, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


NEW_TOKENS = 8
"""Greedy tokens compared per probe prompt."""


@dataclass(frozen=True)
class Probe:
    """What the supernet computes for one prompt with the sub-adapter active."""

    prompt: np.ndarray
    """(1, prompt) int64."""
    tokens: np.ndarray
    """(1, NEW_TOKENS) its greedy continuation, or (1, 1) its class."""
    logits: np.ndarray
    """(NEW_TOKENS, vocab) behind each of those tokens, or (1, classes)."""


@dataclass(frozen=True)
class Agreement:
    """How far a written model is from the supernet over all probes."""

    max_abs_diff: float
    largest_logit: float
    tokens: int
    """Compared, each after the supernet's own."""
    equal: int
    """How many of them were the supernet's choice."""
    decided: bool
    """Whether a differing token was no mere tie: the two candidates were further apart than
    rounding explains."""

    @property
    def greedy_tokens_equal(self) -> bool:
        return self.equal == self.tokens


def inputs_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example
) -> np.ndarray:
    """What is fed before an answer, (1, length) int64."""
    if kind_of(model) is Kind.CLASSIFIER:
        ids = [*encode_text(tokenizer, model, example).ids]
    else:
        ids = prompt_ids(tokenizer, example, model)
    return np.array([ids], dtype=np.int64)


def probe(model: PreTrainedModel, prompt: np.ndarray) -> Probe:
    """A classifier's has one token: the class."""
    runner = runner_of(model)
    logits = [runner.prefill(prompt)]
    tokens = [logits[0].argmax(-1)]
    for _ in range(0 if kind_of(model) is Kind.CLASSIFIER else NEW_TOKENS - 1):
        logits.append(runner.decode(tokens[-1][:, None]))
        tokens.append(logits[-1].argmax(-1))
    return Probe(prompt, np.stack(tokens, axis=1), np.concatenate(logits))


def agreement(runner: Runner, probes: Sequence[Probe]) -> Agreement:
    """Feed every probe's prompt and greedy tokens to `runner`, compare logits and choices."""
    difference = largest = 0.0
    tokens = sum(len(probe.logits) for probe in probes)
    equal, decided = 0, False
    for probe in track(probes, "comparing"):
        for step, expected in enumerate(probe.logits):
            if step == 0:
                found = runner.prefill(probe.prompt)[0]
            else:
                found = runner.decode(probe.tokens[:, step - 1 : step])[0]
            gap = _gap(found, expected)
            # NaN compares false with everything; it must not pass as a small difference.
            difference = float("nan") if np.isnan(gap) else max(difference, gap)
            numbers = np.abs(expected[np.isfinite(expected)])
            largest = max(largest, float(numbers.max(initial=0.0)))
            mine, theirs = int(found.argmax()), int(probe.tokens[0, step])
            equal += mine == theirs
            decided = decided or bool(expected[theirs] - expected[mine] > 2 * gap)
            if np.isnan(difference):
                return Agreement(difference, largest, tokens, 0, True)
    return Agreement(difference, largest, tokens, equal, decided)


def _gap(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of logits (vocabulary,); those of tokens that are cut are minus
    infinity in both."""
    apart = found != expected  # as NaN is of itself
    off = np.subtract(found, expected, where=apart, out=np.zeros_like(expected))
    return float(np.abs(off).max())


def require_agreement(
    kind: str, found: Agreement, limit: float | None, than: str = "the supernet"
) -> None:
    """ExportError when logits are no numbers, or infinite, differ by more than `limit` times the
    largest one, or a greedy token differs that was no tie. Without a limit any difference will
    do."""
    if not np.isfinite(found.max_abs_diff):
        what = "not numbers (NaN)" if np.isnan(found.max_abs_diff) else "infinite"
        raise ExportError(f"{kind}: its logits are {what}; nothing was kept")
    if limit is None:
        return
    allowed = limit * found.largest_logit
    if not found.max_abs_diff <= allowed:
        raise ExportError(
            f"{kind}: logits differ from {than} by up to {found.max_abs_diff:.3g}, more "
            f"than the {allowed:.3g} that rounding explains; nothing was kept"
        )
    if found.decided:
        raise ExportError(
            f"{kind}: greedy tokens differ from those of {than} although logits agree to "
            f"{found.max_abs_diff:.3g}; nothing was kept"
        )
