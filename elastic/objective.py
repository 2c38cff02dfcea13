"""A sub-adapter's figures: accuracy and latency of the very model that would be exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from elastic.cost import Cost, Counter
from elastic.evaluate import Score, evaluate
from elastic.latency import REFERENCE, Latency, Measurement, measure
from elastic.merging import compact
from elastic.runners import TorchRunner
from elastic.search_config import SearchConfig
from elastic.space import SubAdapter
from elastic.supernet import Supernet
from elastic.tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Figures:
    """What a trial stores; all of it is numbers."""

    accuracy: float
    """On the validation split."""
    accuracy_n: int
    prefill_ms: float
    decode_ms: float
    tokens_per_second: float
    """Further tokens of all sequences of the timed batch."""
    params: int
    macs: int

    def budget_values(self) -> dict[str, float]:
        """By the names of `BudgetConfig`."""
        return {
            "prefill_ms": self.prefill_ms,
            "decode_ms": self.decode_ms,
            "tokens_per_second": self.tokens_per_second,
            "params": self.params,
            "macs": self.macs,
            "min_accuracy": self.accuracy,
        }

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Objective:
    """Measures sub-adapters of one supernet against its maximal one, the full model.

    Latency is the candidate's ratio to the full model in the same rounds, times the full model's
    latency at the start of the study: a machine that slows down over an hour does not favour
    early trials. Sub-adapters that differ only in ranks are the same model once merged and share
    one measurement.
    """

    def __init__(
        self,
        net: Supernet,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        config: SearchConfig,
    ) -> None:
        self.net = net
        self.tokenizer = tokenizer
        self.examples = examples
        self.config = config
        self.cost = Counter(net.model, net.space)
        self.full_model = compact(net, net.space.maximal())
        self.full: Figures | None = None
        self.warnings: list[str] = []
        self._ratios: dict[tuple[tuple[str, int], ...], Latency] = {}

    def measure_full(self) -> Figures:
        """The maximal sub-adapter, whose latency is the unit of all others."""
        timing = self._measure({REFERENCE: TorchRunner(self.full_model)}).full
        self.full = self._figures(self.full_model, timing, self.cost.full)
        return self.full

    def __call__(self, sub: SubAdapter) -> Figures:
        """Slice, merge, score on validation, time against the full model."""
        if self.full is None:
            raise RuntimeError("measure_full comes first")
        if sub == self.net.space.maximal():
            return self.full
        model = compact(self.net, sub)
        ratio, full = self._ratio(sub, model), self.full
        timing = Latency(
            ratio.prefill_ms * full.prefill_ms, ratio.decode_ms * full.decode_ms, ratio.spread
        )
        return self._figures(model, timing, self.cost(sub))

    def _figures(self, model, timing: Latency, cost: Cost) -> Figures:
        return Figures(
            accuracy=self._score(model).accuracy,
            accuracy_n=len(self.examples),
            prefill_ms=timing.prefill_ms,
            decode_ms=timing.decode_ms,
            tokens_per_second=1000 * self.config.timing.batch / timing.decode_ms,
            params=cost.params,
            macs=cost.macs,
        )

    def _ratio(self, sub: SubAdapter, model) -> Latency:
        chosen = sub.as_dict()
        shape = tuple((g.name, chosen[g.name]) for g in self.net.space if g.dim != "rank")
        if shape not in self._ratios:
            runners = {REFERENCE: TorchRunner(self.full_model), "candidate": TorchRunner(model)}
            self._ratios[shape] = self._measure(runners).ratio("candidate")
        return self._ratios[shape]

    def _measure(self, runners) -> Measurement:
        vocabulary = self.full_model.config.vocab_size
        found = measure(runners, self.config.timing, vocabulary=vocabulary, seed=self.config.seed)
        if warning := found.warning():
            self.warnings.append(warning)
        return found

    def _score(self, model) -> Score:
        return evaluate(
            model,
            self.tokenizer,
            self.examples,
            batch_tokens=self.config.batch_tokens,
            quiet=True,
        )
