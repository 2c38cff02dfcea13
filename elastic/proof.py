"""The proof that ends an export: what a written model computes, says, weighs and takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elastic.console import say
from elastic.data.task import Example
from elastic.errors import RunError
from elastic.evaluation.in_runtime import answer
from elastic.evaluation.statistics import Score, difference
from elastic.formats.runner import Runner, runner_of
from elastic.latency import weigh
from elastic.latency.bench import ATTEMPTS
from elastic.latency.measure import REFERENCE, Measurement, clock_of, measure
from elastic.verify import Probe, agreement, require_agreement
from elastic.writers import FORMATS
from elastic.writers.base import Source

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
    best = None
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
