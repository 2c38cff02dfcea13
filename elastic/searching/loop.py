"""Ask a study for sub-adapters, have them judged, tell it: until it has as many as were wanted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseGASampler
from optuna.trial import TrialState

from elastic.console import say
from elastic.errors import RunError
from elastic.searching.budget import violations
from elastic.searching.wall_clock import WallClock
from elastic.searching.workers import POLL, Alone, Worker
from elastic.spaces.bound import Candidate, generator_for
from elastic.spaces.candidates import CandidateSpace

FAILURES = 3
"""Trials in a row without figures that end the search."""
PATIENCE = 200
"""Proposals in a row that were all seen before; then the sampler has nothing new to offer."""


class Result(Protocol):
    """What is said of a candidate."""

    def numbers(self) -> Mapping[str, float]:
        """All that must be finite."""

    def budget_values(self) -> Mapping[str, float]:
        """By the names of limits."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""


Said = TypeVar("Said", bound=Result)


@dataclass(frozen=True)
class Loop(Generic[Said]):
    """One study, and what it keeps of its trials."""

    study: optuna.Study
    space: CandidateSpace
    worker: Worker | Alone
    objectives: Sequence[str]
    """Attributes of a result, in the order of the study's directions."""
    name: str
    """Of the attribute in which a trial keeps its result."""
    read: Callable[[Candidate, Mapping[str, Any]], Said]
    """The result of a candidate, of what is kept."""
    clock: WallClock = field(default_factory=WallClock)

    def seen(self) -> dict[Candidate, Said]:
        """Everything judged so far, in order, each once."""
        results: dict[Candidate, Said] = {}
        for trial in self.study.get_trials(deepcopy=False):
            if self.name in trial.user_attrs and trial.state.is_finished():
                candidate = self.space.at(trial.params)
                if candidate not in results:
                    results[candidate] = self.read(candidate, trial.user_attrs[self.name])
        return results

    def run(
        self,
        judge: Callable[[Candidate, Mapping[Candidate, Said]], Said],
        wanted: int,
        limits: Mapping[str, float],
        check: Callable[[Mapping[Candidate, Said]], None] = lambda _: None,
    ) -> Iterator[tuple[int, Said]]:
        """Until the study has `wanted`; those of other workers count. Yields what was judged here,
        and how many there are then. `judge` is also given what is known, which `check` may refuse.
        RunError where several in a row have no figures."""
        failed: set[Candidate] = set()
        repeats = failures = 0
        while repeats < PATIENCE:
            others = len(self.worker.running())
            results = self.seen()
            check(results)
            left = min(wanted, self.space.size - len(failed)) - len(results)
            if left <= 0:
                break
            if left <= others:
                time.sleep(POLL)
                continue
            try:
                with self.clock.during("proposals"):
                    trial = self.study.ask()
                    self.worker.take(trial)
                    candidate = self._suggest(trial)
                repeats = repeats + 1 if candidate in results or candidate in failed else 0
                if self.worker.gives_way(trial):
                    continue
                if candidate in failed:  # it would again
                    self.study.tell(trial, state=TrialState.FAIL)
                    continue
            except UpdateFinishedTrialError:  # by another worker that had been given it too
                continue
            # The same one proposed twice is judged once.
            result = results.get(candidate) or judge(candidate, results)
            lost = not self.worker.holds(trial)
            try:
                told = not lost and self._tell(trial, result, limits)
            except (UpdateFinishedTrialError, ValueError):
                lost = not self.worker.holds(trial)  # in this very moment
                if not lost:
                    raise
            if lost:
                say(f"Trial {trial.number} went to another worker while this one was silent")
                continue
            failures = 0 if told else failures + 1
            if not told:
                failed.add(candidate)
            if failures > FAILURES:
                raise RunError(
                    f"search: {failures} sub-adapters in a row have no figures, the last: {result}"
                )
            if told and candidate not in results:
                yield len(results) + 1, result

    def _suggest(self, trial: optuna.Trial) -> Candidate:
        """Indices into the descending choices: stable names, and an order NSGA-II can cross."""
        sampler = self.study.sampler
        if isinstance(sampler, BaseGASampler):
            # Its population is of trials with a generation, which enqueued ones lack.
            asked = self.study.get_trials(deepcopy=False)[trial.number]
            sampler.get_trial_generation(self.study, asked)
        return self.space.at(
            {g.name: trial.suggest_int(g.name, 0, len(g.choices) - 1) for g in self.space}
        )

    def _tell(self, trial: optuna.Trial, result: Said, limits: Mapping[str, float]) -> bool:
        """Whether the figures are numbers; a trial without has failed, and the search goes on."""
        if not all(map(math.isfinite, result.numbers().values())):
            say(f"Trial {trial.number} failed: {result}")
            self.study.tell(trial, state=TrialState.FAIL)
            return False
        trial.set_user_attr(self.name, result.as_dict())
        for name, amount in violations(result, limits).items():
            trial.set_constraint(name, amount)
        self.study.tell(trial, [getattr(result, name) for name in self.objectives])
        return True


def enqueue_starts(study: optuna.Study, space: CandidateSpace, count: int, seed: int) -> None:
    """The two extremes, the ladder between them, then stratified sub-adapters: so many in all."""
    starts = dict.fromkeys([space.maximal(), space.minimal(), *space.ladder()])
    generator = generator_for(seed, "starts")
    for _ in range(20 * count):
        if len(starts) >= count:
            break
        starts[space.stratified(generator)] = None
    for candidate in list(starts)[:count]:
        study.enqueue_trial(space.indices(candidate), skip_if_exists=True)
