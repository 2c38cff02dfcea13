"""What became of a written model: loaded again, compared with the supernet, and beside the full
model in its own runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from elastic.console import say, track
from elastic.data.task import Example
from elastic.errors import RunError
from elastic.evaluation.in_runtime import answer
from elastic.evaluation.statistics import Score, difference
from elastic.exporting.contract import Source
from elastic.exporting.probes import Agreement, Probe, agreement, require_agreement
from elastic.exporting.targets import FORMATS
from elastic.formats.runner import Runner, runner_of
from elastic.latency import weigh
from elastic.latency.measure import (
    REFERENCE,
    Bounds,
    Latency,
    Measurement,
    clock_of,
    measure,
)
from elastic.models.wrappers import text_config

CANDIDATE = "compact"
TEXTS, TEXT_TOKENS = 3, 24
"""Prompts that are answered freely, and how far."""


class _Plain:
    """In report.json every field stands under its name."""

    def as_dict(self) -> dict[str, Any]:
        rare = ("unanswered", "full_bytes")
        return {k: value for k, value in vars(self).items() if value is not None or k not in rare}


@dataclass(frozen=True)
class Accuracy(_Plain):
    """How often a model is right, on how many examples; None where nobody asked."""

    accuracy: float | None = None
    accuracy_n: int | None = None
    accuracy_interval: Sequence[float] | None = None
    unanswered: int | None = None

    @property
    def told(self) -> str:
        """In words; nothing where nobody asked."""
        if self.accuracy_interval is None:
            return ""
        low, high = self.accuracy_interval
        interval = f"(95 % interval {low:.1%} to {high:.1%})"
        return f"Accuracy {self.accuracy:.1%} {interval} on {self.accuracy_n} test examples"


@dataclass(frozen=True)
class Trade:
    """The compact model's accuracy beside the full one's on the same examples, and how far the
    first is from the second."""

    compact: Accuracy = Accuracy()
    full: Accuracy = Accuracy()
    difference: float | None = None
    difference_interval: Sequence[float] | None = None

    def as_dict(self) -> dict[str, Any]:
        full = {f"full_{name}": value for name, value in self.full.as_dict().items()}
        gap = {"difference": self.difference, "difference_interval": self.difference_interval}
        return {**self.compact.as_dict(), **full, **gap}


@dataclass(frozen=True)
class Weighed(_Plain):
    """Seconds to load and MB in memory, of a written model and of the full one, and the full one's
    size on disk; None where that was not measured."""

    load_s: float | None = None
    memory_mb: float | None = None
    full_load_s: float | None = None
    full_memory_mb: float | None = None
    full_bytes: int | None = None


@dataclass(frozen=True)
class Skipped(_Plain):
    """A format that was asked for and cannot hold this sub-adapter."""

    skipped: str
    """Why."""


@dataclass(frozen=True)
class Unproved(_Plain):
    """A model that was written, and that nothing here ran."""

    bytes: int
    unproved: str
    """Why."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What its format alone has to say."""

    def as_dict(self) -> dict[str, Any]:
        return {**self.about, "bytes": self.bytes, "unproved": self.unproved}


@dataclass(frozen=True, kw_only=True)
class Proof:
    """A model that was written, loaded again and compared."""

    about: Mapping[str, Any]
    """What its format alone has to say."""
    bytes: int
    exact: Agreement
    """With the supernet, where it has to be the same."""
    deployed: Agreement
    """As it runs in its own runtime."""
    precision: str
    """In which it runs there."""
    timing: Measurement
    weighed: Weighed
    texts: Sequence[str]
    """Its answers to the prompts of the report."""
    trade: Trade
    as_torch: bool
    """Whether it computes what the models in memory do, so that their accuracy is its own."""

    @property
    def latency(self) -> Latency:
        return self.timing.latencies[CANDIDATE]

    @property
    def ratio(self) -> Latency:
        """Its latency in parts of the full model's."""
        return self.timing.ratios[CANDIDATE]

    @property
    def bounds(self) -> Bounds:
        """Between which that lies."""
        return self.timing.bounds[CANDIDATE]

    def as_dict(self) -> dict[str, Any]:
        off, full = self.deployed.max_abs_diff, self.timing.full
        return {
            **self.about,
            "bytes": self.bytes,
            "max_abs_diff": self.exact.max_abs_diff,
            "largest_logit": self.exact.largest_logit,
            "greedy_tokens_equal": self.exact.greedy_tokens_equal,
            "deployed": {
                "precision": self.precision,
                "tokens": self.deployed.tokens,
                "tokens_equal": self.deployed.equal,
                "max_abs_diff": off if math.isfinite(off) else None,
            },
            "prefill_ms": self.latency.prefill_ms,
            "decode_ms": self.latency.decode_ms,
            "full_prefill_ms": full.prefill_ms,
            "full_decode_ms": full.decode_ms,
            "prefill_ratio": self.ratio.prefill_ms,
            "decode_ratio": self.ratio.decode_ms,
            "prefill_ratio_interval": list(self.bounds.prefill),
            "decode_ratio_interval": list(self.bounds.decode),
            "control": self.timing.control,
            "trusted": self.timing.trusted,
            **self.weighed.as_dict(),
            "texts": self.texts,
            **self.trade.as_dict(),
        }


Result = Proof | Unproved | Skipped
"""What became of one format."""


def prove(
    kind: str,
    source: Source,
    directory: Path,
    probes: Sequence[Probe],
    test: Sequence[Example],
) -> Proof | Unproved:
    """What was written into this folder, loaded again: compared with the supernet, and beside the
    full model in the same runtime. ExportError when it computes something else."""
    format, config = FORMATS[kind], source.config
    about = format.about(source, directory)
    if format.runtime is None:
        return Unproved(size_of(directory), "read back, but nothing here runs it", about)
    runner = format.open(source, "compact", directory)
    exact = format.exact(source, directory, runner)
    found = agreement(exact, probes)
    require_agreement(kind, found, format.limit(source))
    return Proof(
        about=about,
        bytes=size_of(directory),
        exact=found,
        deployed=found if exact is runner else agreement(runner, probes),
        precision=format.precision(source, runner),
        timing=timed(kind, source, runner),
        weighed=weighed(kind, source, directory),
        texts=texts(runner, source, test),
        trade=scored(kind, source, runner, test[: config.runtime_examples]),
        as_torch=format.as_torch(source, runner),
    )


def timed(kind: str, source: Source, runner: Runner) -> Measurement:
    """Beside the full model, which takes turns with it."""
    format, timing = FORMATS[kind], source.config.timing
    runners = {
        REFERENCE: format.timed(source, format.full(source, kind)),
        CANDIDATE: format.timed(source, runner),
    }
    return measure(
        runners,
        timing,
        vocabulary=text_config(source.models["compact"].config).vocab_size,
        seed=source.config.seed,
        clock=clock_of(torch.device(format.device(source))),
    )


def weighed(kind: str, source: Source, directory: Path) -> Weighed:
    """Each in a process of its own."""
    if not source.config.weigh:
        return Weighed()
    loads = FORMATS[kind].loads(source, kind, directory)
    try:
        own, full = weigh.weigh(loads)
    except RunError as error:
        say(str(error))
        return Weighed()
    size = size_of(Path(loads[1].folder))
    return Weighed(own.load_s, own.memory_mb, full.load_s, full.memory_mb, size)


def texts(runner: Runner, source: Source, test: Sequence[Example]) -> list[str]:
    """What it answers greedily to a few prompts; of a classifier the classes."""
    model, tokenizer = source.models["compact"], source.base.tokenizer
    asked = track(test[:TEXTS], "answering")
    return [answer(runner, model, tokenizer, each, TEXT_TOKENS) for each in asked]


def scored(kind: str, source: Source, runner: Runner, examples: Sequence[Example]) -> Trade:
    """Right in that runtime on so many examples, beside the full model; not asked where that is
    known as soon as the models in memory are scored."""
    format = FORMATS[kind]
    if format.as_torch(source, runner) or not examples:
        return Trade()
    score = format.score(source, "compact", runner, examples)
    return beside(format.score_full(source, kind, examples), score)


def beside(full: Score, compact: Score) -> Trade:
    """Both on the same examples."""
    gap, interval = difference(compact, full)
    own, whole = (Accuracy(**score.as_dict()) for score in (compact, full))
    return Trade(own, whole, gap, list(interval))


@dataclass(frozen=True)
class Sample(_Plain):
    """A prompt that is answered freely."""

    prompt: str
    answer: str
    """That was trained."""
    full: str
    """What the full model says."""


def samples(source: Source, test: Sequence[Example]) -> list[Sample]:
    """The prompts of `texts`."""
    said = texts(runner_of(source.models["full"]), source, test)
    return [Sample(each.text, each.answer, text) for each, text in zip(test, said, strict=False)]


def size_of(directory: Path) -> int:
    """Bytes of all files below."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
