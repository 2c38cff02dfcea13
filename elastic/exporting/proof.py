"""Whether a written model computes what the supernet does, on a few prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from elastic.console import say
from elastic.data.encoding import encode_text, prompt_ids
from elastic.data.task import Example
from elastic.errors import ExportError, RunError
from elastic.evaluation.in_runtime import answer
from elastic.evaluation.statistics import Score, difference
from elastic.exporting.contract import Source
from elastic.exporting.targets import FORMATS
from elastic.formats.runner import Runner, runner_of
from elastic.latency import weigh
from elastic.latency.bench import ATTEMPTS
from elastic.latency.measure import REFERENCE, Measurement, clock_of, measure
from elastic.models.kinds import classes_of

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
    if classes_of(model):
        ids = list(encode_text(tokenizer, model, example).ids)
    else:
        ids = prompt_ids(tokenizer, example)
    return np.array([ids], dtype=np.int64)


def probe(model: PreTrainedModel, prompt: np.ndarray) -> Probe:
    """A classifier's has one token: the class."""
    runner = runner_of(model)
    logits = [runner.prefill(prompt)]
    tokens = [logits[0].argmax(-1)]
    for _ in range(0 if classes_of(model) else NEW_TOKENS - 1):
        logits.append(runner.decode(tokens[-1][:, None]))
        tokens.append(logits[-1].argmax(-1))
    return Probe(prompt, np.stack(tokens, axis=1), np.concatenate(logits))


def agreement(runner: Runner, probes: Sequence[Probe]) -> Agreement:
    """Feed every probe's prompt and greedy tokens to `runner`, compare logits and choices."""
    difference = largest = 0.0
    tokens = sum(len(probe.logits) for probe in probes)
    equal, decided = 0, False
    for probe in probes:
        for step, expected in enumerate(probe.logits):
            if step == 0:
                found = runner.prefill(probe.prompt)[0]
            else:
                found = runner.decode(probe.tokens[:, step - 1 : step])[0]
            gap = float(np.abs(found - expected).max())
            # NaN compares false with everything; it must not pass as a small difference.
            difference = float("nan") if np.isnan(gap) else max(difference, gap)
            largest = max(largest, float(np.abs(expected).max()))
            mine, theirs = int(found.argmax()), int(probe.tokens[0, step])
            equal += mine == theirs
            decided = decided or bool(expected[theirs] - expected[mine] > 2 * gap)
            if np.isnan(difference):
                return Agreement(difference, largest, tokens, 0, True)
    return Agreement(difference, largest, tokens, equal, decided)


def require_agreement(kind: str, found: Agreement, limit: float | None) -> None:
    """ExportError when logits are no numbers, differ by more than `limit` times the largest one, or
    a greedy token differs that was no tie. Without a limit any difference will do."""
    if np.isnan(found.max_abs_diff):
        raise ExportError(f"{kind}: its logits are not numbers (NaN); nothing was kept")
    if limit is None:
        return
    allowed = limit * found.largest_logit
    if not found.max_abs_diff <= allowed:
        raise ExportError(
            f"{kind}: logits differ from the supernet by up to {found.max_abs_diff:.3g}, more "
            f"than the {allowed:.3g} that rounding explains; nothing was kept"
        )
    if found.decided:
        raise ExportError(
            f"{kind}: greedy tokens differ from the supernet's although logits agree to "
            f"{found.max_abs_diff:.3g}; nothing was kept"
        )


CANDIDATE = "compact"
TEXTS, TEXT_TOKENS = 3, 24
"""Prompts that are answered freely, and how far."""
NO_SCORE = dict.fromkeys(("accuracy", "accuracy_n", "accuracy_interval"))
NOT_BESIDE = dict.fromkeys(
    (*(f"full_{name}" for name in NO_SCORE), "difference", "difference_interval")
)


def prove(
    kind: str,
    source: Source,
    directory: Path,
    probes: Sequence[Probe],
    test: Sequence[Example],
) -> dict[str, Any]:
    """What was written into this folder, loaded again: compared with the supernet, and beside the
    full model in the same runtime. ExportError when it computes something else."""
    format, config = FORMATS[kind], source.config
    if format.runtime is None:
        return {"bytes": size_of(directory), "unproved": "read back, but nothing here runs it"}
    runner = format.open(source, "compact", directory)
    exact = format.exact(source, directory, runner)
    found = agreement(exact, probes)
    require_agreement(kind, found, format.limit(source))
    deployed = found if exact is runner else agreement(runner, probes)
    timing = timed(kind, source, runner)
    own, full, ratio = timing.latencies[CANDIDATE], timing.full, timing.ratio(CANDIDATE)
    return {
        **format.about(source, directory),
        "bytes": size_of(directory),
        "max_abs_diff": found.max_abs_diff,
        "largest_logit": found.largest_logit,
        "greedy_tokens_equal": found.greedy_tokens_equal,
        "deployed": {
            "precision": format.precision(source, runner),
            "tokens": deployed.tokens,
            "tokens_equal": deployed.equal,
            "max_abs_diff": None if np.isnan(deployed.max_abs_diff) else deployed.max_abs_diff,
        },
        "prefill_ms": own.prefill_ms,
        "decode_ms": own.decode_ms,
        "full_prefill_ms": full.prefill_ms,
        "full_decode_ms": full.decode_ms,
        "prefill_ratio": ratio.prefill_ms,
        "decode_ratio": ratio.decode_ms,
        "control": timing.control,
        "trusted": timing.trusted,
        **weighed(kind, source, directory),
        "texts": texts(runner, source, test),
        **scored(kind, source, runner, test[: config.runtime_examples]),
    }


def timed(kind: str, source: Source, runner: Runner) -> Measurement:
    """Beside the full model, which takes turns with it; what is measured in peace, or the calmest
    of a few attempts."""
    format, timing = FORMATS[kind], source.config.timing
    runners = {
        REFERENCE: format.timed(source, format.full(source, kind)),
        CANDIDATE: format.timed(source, runner),
    }
    best: Measurement | None = None
    for _ in range(ATTEMPTS):
        found = measure(
            runners,
            timing,
            vocabulary=source.models["compact"].config.vocab_size,
            seed=source.config.seed,
            clock=clock_of(torch.device(format.device(source))),
        )
        if best is None or found.control < best.control:
            best = found
        if found.trusted:
            break
    assert best is not None
    return best


def weighed(kind: str, source: Source, directory: Path) -> dict[str, float | None]:
    """Seconds to load and MB in memory, of the written model and of the full one."""
    names = ("load_s", "memory_mb")
    found = dict.fromkeys((*names, *(f"full_{name}" for name in names)))
    if not source.config.weigh:
        return found
    loads = FORMATS[kind].loads(source, kind, directory)
    try:
        own, full = weigh.weigh(loads)
    except RunError as error:
        say(str(error))
        return found
    found |= vars(own) | {f"full_{name}": value for name, value in vars(full).items()}
    return {**found, "full_bytes": size_of(Path(loads[1].folder))}


def texts(runner: Runner, source: Source, test: Sequence[Example]) -> list[str]:
    """What it answers greedily to a few prompts; of a classifier the classes."""
    model, tokenizer = source.models["compact"], source.base.tokenizer
    return [answer(runner, model, tokenizer, each, TEXT_TOKENS) for each in test[:TEXTS]]


def scored(
    kind: str, source: Source, runner: Runner, examples: Sequence[Example]
) -> dict[str, Any]:
    """Right in that runtime on so many examples, beside the full model; `as_torch` where that is
    known as soon as the models in memory are scored."""
    format = FORMATS[kind]
    if format.as_torch(source, runner):
        return {**NO_SCORE, **NOT_BESIDE, "as_torch": True}
    if not examples:
        return NO_SCORE | NOT_BESIDE
    score = format.score(source, "compact", runner, examples)
    return score.as_dict() | beside(format.score_full(source, kind, examples), score)


def beside(full: Score, compact: Score) -> dict[str, Any]:
    """What the full model scores on the same examples, and how far the compact one is from it."""
    gap, interval = difference(compact, full)
    known = {f"full_{name}": value for name, value in full.as_dict().items()}
    return {**known, "difference": gap, "difference_interval": list(interval)}


def samples(source: Source, test: Sequence[Example]) -> list[dict[str, str]]:
    """The prompts of `texts`, the answers that were trained and what the full model says."""
    said = texts(runner_of(source.models["full"]), source, test)
    return [
        {"prompt": example.text, "answer": example.answer, "full": text}
        for example, text in zip(test, said, strict=False)
    ]


def size_of(directory: Path) -> int:
    """Bytes of all files below."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
