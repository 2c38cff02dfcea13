"""Sub-adapters of one supernet, as they would be deployed, timed on this machine."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from elastic.config import TimingConfig
from elastic.console import counting
from elastic.files import scratch
from elastic.formats.rounding import saved_bytes
from elastic.formats.runner import Runner, runner_of
from elastic.formats.text_only import as_text
from elastic.latency.measure import REFERENCE, Measurement, clock_of, measure, state_of
from elastic.latency.runtime import open_runner
from elastic.models.meter import Meter
from elastic.models.packaged import cache_directory
from elastic.models.wrappers import text_config
from elastic.spaces.bound import BoundSpace, Candidate, SubAdapter
from elastic.supernet.compact import compact, sliced
from elastic.supernet.supernet import Supernet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CANDIDATE = "candidate"
MOST, ROOM = 3, 4e9
"""So many sub-adapters take turns in the same rounds, as far as their bytes have room. Of more the
rounds would get long, and a machine that changes its pace within one favours somebody."""


class Bench:
    """Times sub-adapters against the full model in the same rounds. A context manager: what a
    runtime wants as files lives as long as the block.

    Sub-adapters that are the same model once merged, differing in ranks alone, share one
    measurement.
    """

    def __init__(self, net: Supernet, timing: TimingConfig, seed: int = 0) -> None:
        self.net = net
        self.timing = timing
        self.seed = seed
        self._found: dict[Hashable, Measurement] = {}
        self._memory: dict[Hashable, float] = {}
        self._files = contextlib.ExitStack()
        self._full: Runner | None = None
        # The other runtimes run on the CPU, wherever the supernet is.
        self.device = net.model.device if timing.runtime == "torch" else torch.device("cpu")
        self.state: dict[str, float | str] | None = None
        """Of the device's clocks, after the last measurement; None on a CPU."""

    def __enter__(self) -> Bench:
        self._files.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._full = None
        self._files.__exit__(*error)

    def __call__(self, candidate: Candidate) -> Measurement:
        """The full model's latencies and, as CANDIDATE, this one's."""
        return self.together([candidate])[0]

    def together(self, candidates: Sequence[Candidate], label: str = "timing") -> list[Measurement]:
        """The same of each. Several that take turns in the same rounds share those of the full
        model, so that each but the first takes a third of its time."""
        asked = {self._key(one): one for one in candidates}
        missing = [key for key in asked if key not in self._found]
        whole = sum(parameter.nbytes for parameter in self.net.model.parameters())
        count = max(1, min(MOST, int(ROOM // whole)))
        with counting(label, len(missing)) as steps:
            for start in range(0, len(missing), count):
                some = missing[start : start + count]
                self._measure({key: asked[key] for key in some})
                steps.to(start + len(some))
        return [self._found[self._key(one)] for one in candidates]

    def _measure(self, asked: Mapping[Hashable, Candidate]) -> None:
        if self._full is None:
            self._full = self._open(Candidate(self.net.space.maximal()), self._files)
        with contextlib.ExitStack() as files:
            names = {key: f"{CANDIDATE} {number}" for number, key in enumerate(asked)}
            runners = {names[key]: self._open(one, files) for key, one in asked.items()}
            found = measure(
                {REFERENCE: self._full, **runners}, self.timing, seed=self.seed,
                vocabulary=text_config(self.net.model.config).vocab_size,
                clock=clock_of(self.device),
            )  # fmt: skip
            self.state = state_of(self.device)
        for key, name in names.items():
            self._found[key] = found.of(name, CANDIDATE)

    def memory_mb(self, candidate: Candidate) -> float:
        """Weights and, at its peak, what a prefill holds beside them: 1e6 bytes, as torch allocates
        them, whatever the runtime; of compressed weights, their codes and scales."""
        key = self._key(candidate)
        if key not in self._memory:
            self._memory[key] = self._peak(self._model(candidate.sub_adapter), candidate.compress)
        return self._memory[key]

    def _key(self, candidate: Candidate) -> Hashable:
        shape = shape_of(self.net.space, candidate.sub_adapter, merged=self.timing.merged)
        return shape, candidate.compress

    def _peak(self, model: PreTrainedModel, compress: str | None) -> float:
        held = [*model.parameters(), *model.buffers()]
        weights = {tensor.untyped_storage().data_ptr(): tensor for tensor in held}
        shape = (self.timing.batch, self.timing.prompt_tokens)
        prompt = torch.zeros(shape, dtype=torch.int64).numpy()
        with Meter(weights.values()).recording() as meter:
            runner_of(model).prefill(prompt)
        kept = sum(tensor.untyped_storage().nbytes() for tensor in weights.values())
        kept -= saved_bytes(model, compress) if compress else 0
        return float(kept + meter.peak) / 1e6

    def _model(self, sub: SubAdapter) -> PreTrainedModel:
        model = (compact if self.timing.merged else sliced)(self.net, sub)
        if self.timing.runtime != "torch":  # whose graphs have the language model alone
            model = as_text(model)
        if self.timing.runtime == "torch" or model.dtype == torch.float32:
            return model
        return copy.deepcopy(model).float()  # what was not cut is shared with the supernet

    def _open(self, candidate: Candidate, files: contextlib.ExitStack) -> Runner:
        folder = None
        if self.timing.runtime != "torch":
            folder = files.enter_context(scratch(cache_directory() / "timing"))
        model = self._model(candidate.sub_adapter)
        # While it is at hand.
        self._memory[self._key(candidate)] = self._peak(model, candidate.compress)
        return open_runner(self.timing, model, folder, candidate.compress)


def shape_of(space: BoundSpace, sub: SubAdapter, *, merged: bool) -> tuple[int, ...]:
    """The choices that make a difference to its speed."""
    chosen = sub.as_dict()
    return tuple(chosen[g.name] for g in space if g.dim != "rank" or not merged)
