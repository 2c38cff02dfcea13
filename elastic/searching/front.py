"""The result of a search: sub-adapters worth choosing from, as JSON, table and plot."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from elastic import plotting
from elastic.console import wide
from elastic.data.vocabulary import Sayable
from elastic.evaluation.statistics import CORRECT, Score, difference
from elastic.files import new_directory, write_json, write_text
from elastic.latency.bench import CANDIDATE
from elastic.latency.latency_table import Timetable
from elastic.latency.measure import Measurement
from elastic.run import Run
from elastic.searching.budget import violations
from elastic.searching.drawing import COSTS, draw
from elastic.searching.objective import Figures
from elastic.searching.sampler import Foresight
from elastic.spaces.bound import BoundSpace, Candidate, SubAdapter
from elastic.supernet.held_out import Compensated

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Evaluated:
    """One candidate that the search measured."""

    candidate: Candidate
    figures: Figures
    """As the search measured them; accuracy on validation."""
    estimate: float
    """Accuracy on validation less its noise, as far as the other sub-adapters' tell it."""
    feasible: bool
    """Whether figures and estimate meet the budget."""

    @property
    def sub_adapter(self) -> SubAdapter:
        return self.candidate.sub_adapter

    @property
    def judged(self) -> Figures:
        """What a budget is held against: the figures with the estimate as their accuracy."""
        return replace(self.figures, accuracy=self.estimate)


@dataclass(frozen=True)
class Measured:
    """Latencies of one of the front, beside those that the table predicts."""

    prefill_ms: float
    decode_ms: float
    control: float
    """How much the full model differed from itself meanwhile."""
    trusted: bool
    least_prefill_ms: float | None = None
    """The low end of the 95 % interval: that it takes longer is not certain. None in studies of
    earlier versions."""
    least_decode_ms: float | None = None

    @classmethod
    def of(cls, found: Measurement, full: Figures) -> Measured:
        """The ratio to the full model in the same rounds, in the unit of its `full` figures: a
        machine that has slowed down since then favours nobody."""
        ratio, bounds = found.ratios[CANDIDATE], found.bounds[CANDIDATE]
        return cls(
            ratio.prefill_ms * full.prefill_ms,
            ratio.decode_ms * full.decode_ms,
            found.control,
            found.trusted,
            bounds.prefill[0] * full.prefill_ms,
            bounds.decode[0] * full.decode_ms,
        )

    def at_least(self) -> Measured:
        """The latencies that are certain: the low ends of the intervals."""
        prefill, decode = self.least_prefill_ms, self.least_decode_ms
        return replace(
            self,
            prefill_ms=self.prefill_ms if prefill is None else prefill,
            decode_ms=self.decode_ms if decode is None else decode,
        )

    def instead_of(self, figures: Figures) -> Figures:
        """The figures with these latencies for the predicted ones."""
        ratio = figures.decode_ms / self.decode_ms if self.decode_ms else 1.0
        speed = figures.tokens_per_second * ratio
        return replace(
            figures,
            prefill_ms=self.prefill_ms,
            decode_ms=self.decode_ms,
            tokens_per_second=speed,
        )


@dataclass(frozen=True)
class Member(Evaluated):
    """One of the front, with its accuracy on the test split, which the search never saw."""

    name: str
    test: Mapping[str, Any]
    """accuracy, accuracy_n, accuracy_interval, the compensation it was scored with, which examples
    were right (`Score.marks`) and, where its head knows some tokens alone, what it can say."""
    full_correct: str
    """Which the full model had right."""
    measured: Measured | None
    """None where the target is another machine."""
    best: bool = False
    recovery: Mapping[str, Any] | None = None
    """As `elastic.recovery` has it; None: it was not trained on."""

    @property
    def made_up(self) -> Compensated:
        """As it was scored on the test split."""
        return Compensated.of(self.test["compensation"])

    @property
    def sayable(self) -> Sayable | None:
        """Of the test answers; None where its head computes all tokens."""
        found = self.test.get("vocabulary")
        return Sayable(**found) if found else None

    @property
    def full_test(self) -> Score:
        """The full model's on the same test examples."""
        return Score.of_marks(self.full_correct)

    @property
    def beside_full(self) -> tuple[float, tuple[float, float]]:
        """Its test accuracy less the full model's, with the 95 % interval."""
        return difference(Score.of_marks(self.test[CORRECT]), self.full_test)

    def as_dict(self) -> dict[str, Any]:
        gap, interval = self.beside_full
        return {
            "name": self.name,
            "best": self.best,
            **self.test,
            "full_correct": self.full_correct,
            "full_accuracy": self.full_test.accuracy,
            "difference": gap,
            "difference_interval": list(interval),
            "validation_accuracy": self.figures.accuracy,
            "validation_estimate": self.estimate,
            "validation_n": self.figures.accuracy_n,
            "prefill_ms": self.figures.prefill_ms,
            "decode_ms": self.figures.decode_ms,
            "measured": None if self.measured is None else asdict(self.measured),
            "tokens_per_second": self.figures.tokens_per_second,
            "memory_mb": self.figures.memory_mb,
            "params": self.figures.params,
            "macs": self.figures.macs,
            **({"recovery": self.recovery} if self.recovery else {}),
            **self.candidate.as_dict(),
        }


@dataclass(frozen=True)
class Front:
    """Sorted by the first cost, the cheapest first."""

    run: Run
    members: Sequence[Member]
    full: Figures
    """The maximal sub-adapter."""
    trials: Sequence[Evaluated]
    """Everything evaluated, in order."""
    costs: Sequence[str]
    """What accuracy is traded against; the first is drawn."""
    limits: Mapping[str, float]
    """The budget, absolute."""
    timetables: Mapping[str | None, Timetable]
    """What the latencies come from, by compression."""
    space: BoundSpace
    effects: np.ndarray
    """(groups, choices) what every choice is believed to add to the accuracy."""
    foresight: Foresight | None = None
    """How well accuracies were predicted before they were measured."""

    @property
    def best(self) -> Member:
        return next(member for member in self.members if member.best)

    def figures(self) -> dict[str, float]:
        """Of every member what it is and costs, as NAME/figure, and of the best one as best/figure;
        for trackers, which know nothing but numbers."""
        found: dict[str, float] = {}
        for member in self.members:
            own = {**member.figures.numbers(), "test_accuracy": member.test["accuracy"]}
            for name in [member.name, "best"] if member.best else [member.name]:
                found |= {f"{name}/{key}": float(value) for key, value in own.items()}
        return found

    def save(self) -> None:
        """Write front.json, trials.csv, sub_adapters/ and, where it can be drawn, front.png below
        RUN/search."""
        directory = self.run.search
        with new_directory(self.run.sub_adapters) as building:
            for member in self.members:
                names = [member.name, "best"] if member.best else [member.name]
                for name in names:
                    write_json(building / f"{name}.json", self._told(member))
        write_text(directory / "trials.csv", self._csv())
        if plotting.draws(plot := directory / "front.png"):
            draw(self, plot)
        write_json(self.run.front, [self._told(member) for member in self.members])

    def _told(self, member: Member) -> dict[str, Any]:
        """For JSON: beside its own figures what the full model costs."""
        costs = {f"full_{name}": getattr(self.full, name) for name in COSTS}
        return {**member.as_dict(), **costs, "full_validation_accuracy": self.full.accuracy}

    def _csv(self) -> str:
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        names = list(self.full.as_dict())
        writer.writerow(
            ["trial", "feasible", *names, "accuracy_estimate", "compress", "sub_adapter"]
        )
        for number, one in enumerate(self.trials):
            figures = one.figures.as_dict().values()
            chosen = one.candidate.compress or "", str(one.sub_adapter)
            writer.writerow([number, one.feasible, *figures, one.estimate, *chosen])
        return file.getvalue()

    def table(self) -> Table:
        from rich.table import Table

        table = Table(title=f"Pareto front of {len(self.trials)} sub-adapters")
        more = [cost for cost in self.costs if cost in ("memory_mb", "macs")]
        decoding = ["decode ms"] if self.full.decode_ms else []
        weights = ["weights"] if len(self.timetables) > 1 else []
        recovered = ["before recovery"] if self.members[0].recovery else []
        columns = ["", *weights, "test, 95 %", "from full", *recovered, "prefill ms"]
        columns += decoding
        columns += ["params"]
        columns += [f"{cost} ({COSTS[cost].unit})" for cost in more]
        for column in columns:
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for member in self.members:
            low, high = member.test["accuracy_interval"]
            f, full, measured = member.figures, self.full, member.measured
            gap, (worst, most) = member.beside_full
            table.add_row(
                f"{member.name} (best)" if member.best else member.name,
                *(self.weights(member) for _ in weights),
                f"{member.test['accuracy']:.1%} [{100 * low:.1f}, {100 * high:.1f}]",
                f"{100 * gap:+.1f} [{100 * worst:.1f}, {100 * most:.1f}]",
                *(f"{one['before']['accuracy']:.1%}" for one in [member.recovery] if one),
                _ms(f.prefill_ms, measured.prefill_ms if measured else None, full.prefill_ms),
                *(
                    _ms(f.decode_ms, measured.decode_ms if measured else None, full.decode_ms)
                    for _ in decoding
                ),
                f"{f.params / 1e6:.1f} M ({f.params / full.params:.0%})",
                *(self._share(f, cost) for cost in more),
                style="bold" if member.best else None,
            )
        return table

    def weights(self, one: Evaluated) -> str:
        """In what they are stored."""
        return one.candidate.compress or self.timetables[None].target.dtype

    def _share(self, figures: Figures, cost: str) -> str:
        amount, whole = getattr(figures, cost), getattr(self.full, cost)
        return f"{amount / COSTS[cost].scale:.1f} ({amount / whole:.0%})"

    def show(self) -> None:
        console = wide(150)
        console.print(self.table())
        n = self.members[0].test["accuracy_n"]
        full, whole = self.full, self.best.full_test.accuracy
        decode = f", {full.decode_ms:.1f} ms decode" if full.decode_ms else ""
        console.print(
            f"Accuracy on {n} test examples the search never saw, of which the full model has "
            f"{whole:.1%} right; points from it, on the same ones. Latency: predicted, measured "
            f"(of the full model's {full.prefill_ms:.1f} ms prefill{decode})."
        )
        if recovery := self.members[0].recovery:
            console.print(_recovered(recovery))
        for member in self.members:
            if member.sayable:
                console.print(f"The head of {member.name} knows {member.sayable}")
        if told := self.foresight:
            console.print(
                f"Model of the accuracy: of {told.n} sub-adapters, predicted before they were "
                f"evaluated, {told}"
            )
        for timetable in self.timetables.values():
            console.print(timetable.describe())
        if timing := self.best.measured:
            if over := self._over(timing.at_least()):
                console.print(f"None meets the budget as measured; {over}", style="bold red")
            elif over := self._over(timing):
                console.print(f"As measured {over}: the rounds cannot tell it from the budget")
        timed = [member.measured for member in self.members if member.measured]
        if not timed:
            console.print(f"Not measured: this is not {self.timetables[None].target.device}")
        elif noisy := [each for each in timed if not each.trusted]:
            console.print(
                f"{len(noisy)} of {len(timed)} measurements cannot be trusted: the full "
                f"model differed from itself by up to {max(e.control for e in noisy):.1%}",
                style="bold red",
            )
        drawn = f"{self.run.search / 'front.png'}; to choose from: {self.run.report}"
        console.print(plotting.where_drawn(drawn))
        console.print(f"Next: elastic export {self.run.path}")
        best = self.best.as_dict()
        long = ("sub_adapter", "recovery", CORRECT, "full_correct")
        best = {k: v for k, v in best.items() if k not in long}
        print(json.dumps({**best, "file": str(self.run.sub_adapters / "best.json")}))

    def _over(self, timing: Measured) -> str | None:
        """What the best one is over with these latencies; None if nothing, or nothing that can be
        told."""
        if not timing.trusted:
            return None
        figures = timing.instead_of(self.best.judged)
        over = violations(figures, self.limits)
        values = figures.budget_values()
        told = [
            f"{name} {values[name]:.4g} (budget {self.limits[name]:.4g})"
            for name, amount in over.items()
            if amount > 0
        ]
        return f"{self.best.name} has {', '.join(told)}" if told else None


def _recovered(recovery: Mapping[str, Any]) -> str:
    """What further training was, and what the full model makes of it."""
    before, after = (recovery["maximal"][when]["accuracy"] for when in ("before", "after"))
    return (
        f"Recovery: {recovery['steps']} steps each, kept where the loss of held-out answers is "
        f"lower. The full model after as many: {after:.1%}, before {before:.1%}"
    )


def _ms(predicted: float, measured: float | None, full: float) -> str:
    if measured is None:
        return f"{predicted:.1f} ({predicted / full:.0%})"
    return f"{predicted:.1f}, {measured:.1f} ({measured / full:.0%})"
