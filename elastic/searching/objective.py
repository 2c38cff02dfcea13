"""A sub-adapter's figures: the accuracy of the very model that would be exported, and what it costs
on the target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from elastic.config import SearchConfig
from elastic.data.task import Example
from elastic.evaluation.evaluate import evaluate
from elastic.formats.rounding import round_
from elastic.latency.cost_table import Table, Tables
from elastic.latency.latency_table import Timetable
from elastic.latency.measure import per_second
from elastic.searching.wall_clock import WallClock
from elastic.spaces.bound import Candidate, generator_for
from elastic.spaces.candidates import CandidateSpace, bits_of
from elastic.supernet.cost import Counter
from elastic.supernet.held_out import Compensated, HeldOut
from elastic.supernet.supernet import Supernet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


LOOKS = (0.25, 0.5, 0.75)
"""Parts of the examples after which a sub-adapter may be stopped."""


@dataclass(frozen=True)
class Figures:
    """What a trial stores."""

    accuracy: float
    """On the validation split. Of a sub-adapter that was stopped: its rival's, less what it lost
    to it on the examples seen."""
    accuracy_n: int
    """Examples seen."""
    prefill_ms: float
    """This and the next ones as the latency table predicts them."""
    decode_ms: float
    tokens_per_second: float
    """Further tokens of all sequences of the timed batch."""
    memory_mb: float
    params: int
    macs: int
    degree: float = 0.0
    """How much of what it cuts it makes up for."""
    sequential: bool = False
    """Whether it was fitted to the full model on top of that."""
    held_out_losses: Mapping[str, float] = field(default_factory=dict)
    """What decided that, by degree and when fitted: mean loss of an answer token."""
    correct: str = ""
    """One digit per example seen, 1 where it was right, in an order of the examples that all
    trials of a study share."""

    @property
    def made_up(self) -> Compensated:
        """As the search evaluated it."""
        return Compensated(self.degree, self.sequential, self.held_out_losses)

    def budget_values(self) -> dict[str, float]:
        """By the names of `BudgetConfig`."""
        values = self.numbers()
        values.pop("accuracy_n")
        return {"min_accuracy": values.pop("accuracy"), **values}

    def numbers(self) -> dict[str, float]:
        """All that is a number and no setting."""
        others = ("degree", "sequential", "held_out_losses", "correct")
        return {name: value for name, value in asdict(self).items() if name not in others}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Objective:
    """Scores candidates of one supernet and looks up what they cost."""

    def __init__(
        self,
        net: Supernet,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        config: SearchConfig,
        timetables: Mapping[str | None, Timetable],
        held_out: HeldOut,
        clock: WallClock | None = None,
    ) -> None:
        """`timetables` by compression; None: as it is. Where the time goes, `clock` is told."""
        self.clock = clock or WallClock()
        self.net = net
        self.space = CandidateSpace.of(net.space, config.compress)
        self.tokenizer = tokenizer
        self.config = config
        self.timetables = timetables
        self.held_out = held_out
        self.cost = Counter(net.model, net.space)
        self.full: Figures | None = None
        """Those of the maximal sub-adapter, when known."""
        self.examples = list(examples)
        generator_for(config.seed, "examples").shuffle(self.examples)

    def __call__(
        self, candidate: Candidate, rivals: Mapping[Candidate, Figures] | None = None
    ) -> Figures:
        """Slice, merge, make up for what is cut, score on validation; of the `rivals`, the most
        accurate one that costs no more may end that early."""
        if candidate == self.space.maximal() and self.full is not None:
            return self.full
        return self.figures(candidate, rivals or {})

    def figures(self, candidate: Candidate, rivals: Mapping[Candidate, Figures]) -> Figures:
        """The same, whether it is known or not."""
        costs = self.costs(candidate)
        with self.clock.during("compensation"):
            made_up = self.held_out(candidate.sub_adapter)
        if self.config.compensation.every_trial:
            with self.clock.during("fitting"):
                made_up, model = self.held_out.refined(candidate.sub_adapter, made_up)
                model = self.rounded(model, candidate)
        else:
            with self.clock.during("slicing"):
                model = self.model(candidate, made_up)
        with self.clock.during("evaluation"):
            correct, accuracy = self._race(model, self._rivals(costs, rivals))
        return Figures(
            accuracy=accuracy, accuracy_n=len(correct), correct=correct, degree=made_up.degree,
            sequential=made_up.sequential, held_out_losses=made_up.losses, **costs,
        )  # fmt: skip

    def model(self, candidate: Candidate, made_up: Compensated) -> PreTrainedModel:
        """What it is scored as: sliced, merged, that much made up for, and rounded."""
        return self.rounded(self.held_out.model(candidate.sub_adapter, made_up), candidate)

    def divergence(self, candidate: Candidate, rows: int) -> float:
        """From the full model, on the first held-out examples, at least so many; a middling part of
        what is cut is made up for."""
        degrees = sorted(self.config.compensation.degrees)
        made_up = Compensated(degrees[len(degrees) // 2])
        if candidate.compress:
            return self.held_out.divergence(self.model(candidate, made_up), rows)
        with self.net.active(candidate.sub_adapter, made_up.degree) as model:
            return self.held_out.divergence(model, rows)

    def rounded(self, model: PreTrainedModel, candidate: Candidate) -> PreTrainedModel:
        """In the candidate's precision."""
        mode = candidate.compress
        return round_(model, mode, self.config.timing.runtime) if mode else model

    def costs(self, candidate: Candidate) -> dict[str, Any]:
        """All figures but accuracy."""
        sub = candidate.sub_adapter
        predicted, counted = self.timetables[candidate.compress](sub), self.cost(sub)
        speed = per_second(self.config.timing.batch, predicted["decode_ms"])
        return {
            **predicted,
            "tokens_per_second": speed,
            "params": counted.params,
            "macs": counted.macs,
        }

    def smallest(self) -> list[dict[str, Any]]:
        """`costs` of everything at its smallest, at every precision: fewer bits are smaller, not
        faster. So is a head that computes all tokens where it is the embeddings, too."""
        least = self.space.minimal()
        sub = least.sub_adapter
        return [
            self.costs(replace(least, sub_adapter=each, compress=mode))
            for each in dict.fromkeys([sub, self.space.with_whole_vocabulary(sub)])
            for mode in self.space.modes
        ]

    def table(self, cost: str) -> Table | Tables:
        """What every choice saves of a cost."""
        known = self.timetables[None].tables
        if cost not in known:
            return Table.counted(self.space, lambda one: getattr(self.cost(one.sub_adapter), cost))
        if not self.config.compress:
            return known[cost]
        by_bits = {bits_of(mode): each.tables[cost] for mode, each in self.timetables.items()}
        return Tables(self.space, by_bits)

    def _rivals(
        self, costs: Mapping[str, float], rivals: Mapping[Candidate, Figures]
    ) -> list[Figures]:
        return [
            figures
            for figures in rivals.values()
            if len(figures.correct) == len(self.examples)
            and all(getattr(figures, name) <= costs[name] for name in self.config.costs)
        ]

    def _race(self, model: PreTrainedModel, rivals: Sequence[Figures]) -> tuple[str, float]:
        """Right or wrong by example, and the accuracy.

        At every look the sign test (McNemar 1947, exact) asks how likely one as accurate as the
        most accurate rival would have lost to it so often. The error rate is shared among the looks
        and the rivals, the best of whom may have been lucky (Bonferroni).
        """
        rival = max(rivals, key=lambda figures: figures.accuracy, default=None)
        looks = LOOKS if rivals and self.config.race else ()
        ends = [round(look * len(self.examples)) for look in looks] + [len(self.examples)]
        correct, start = "", 0
        for end in ends:
            if end == start:
                continue
            score = evaluate(
                model, self.tokenizer, self.examples[start:end],
                batch_tokens=self.config.batch_tokens, label="scoring",
            )  # fmt: skip
            correct += score.marks
            start = end
            if rival and end < len(self.examples):
                won, lost = wins(correct, rival.correct)
                if chance(won, lost) < self.config.race / (len(looks) * len(rivals)):
                    return correct, max(0.0, rival.accuracy + (won - lost) / end)
        return correct, correct.count("1") / len(correct)


def wins(mine: str, theirs: str) -> tuple[int, int]:
    """Examples that one alone had right, and those that the other alone had, of those both saw."""
    pairs = list(zip(mine, theirs, strict=False))
    return pairs.count(("1", "0")), pairs.count(("0", "1"))


def chance(won: int, lost: int) -> float:
    """Probability of losing at least so many of won + lost fair coin tosses."""
    n = won + lost
    return float(sum(math.comb(n, k) for k in range(lost, n + 1)) / 2**n)
