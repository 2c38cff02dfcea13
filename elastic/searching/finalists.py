"""From everything evaluated to the front: who is on it, its test accuracy and its real latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from elastic.config import SearchConfig
from elastic.config.search import limits_accuracy_alone, without_password
from elastic.console import busy, say, track
from elastic.data.task import Example
from elastic.errors import BudgetError
from elastic.evaluation.evaluate import evaluate
from elastic.evaluation.statistics import CORRECT
from elastic.files import write_json
from elastic.latency.bench import Bench
from elastic.latency.target import Target
from elastic.provenance import provenance
from elastic.run import Run, as_plain, waiting
from elastic.searching.budget import impossible, met
from elastic.searching.front import Evaluated, Front, Measured, Member
from elastic.searching.objective import Figures, Objective
from elastic.searching.page import write_page
from elastic.searching.pareto import non_dominated, thin
from elastic.searching.sampler import foresight, learn
from elastic.spaces.bound import Candidate
from elastic.supernet.held_out import Compensated
from elastic.supernet.vocabulary import said_by

if TYPE_CHECKING:
    import optuna


COMPENSATION, VOCABULARY = "compensation", "vocabulary"
SCORES, TIMES = "test scores", "measured"
"""What a study keeps of its finalists, by candidate."""


def finish(
    run: Run,
    config: SearchConfig,
    objective: Objective,
    study: optuna.Study,
    results: Mapping[Candidate, Figures],
    *,
    test: Sequence[Example],
    here: Target,
    importance: Mapping[str, float] | None = None,
    parts: np.ndarray | None = None,
) -> Front:
    """Non-dominated sub-adapters within the budget, scored on the test split, timed for real where
    this is the target, and saved; BudgetError if none is within. The study keeps scores and times,
    so that nothing is asked twice and a worker elsewhere loses no measurement."""
    assert objective.full is not None
    space, timetables = objective.space, objective.timetables
    accuracies = {one: figures.accuracy for one, figures in results.items()}
    learnt = space, accuracies, len(objective.examples), importance, parts
    belief, foreseen = learn(*learnt), foresight(*learnt)
    estimates = belief.fitted.clip(0, 1).tolist()
    estimated = {
        one: replace(figures, accuracy=estimate)
        for (one, figures), estimate in zip(results.items(), estimates, strict=True)
    }
    full = estimated.get(space.maximal(), objective.full)
    limits = config.budget.resolved(full.budget_values())
    trials = [
        Evaluated(one, results[one], figures.accuracy, met(figures, limits))
        for one, figures in estimated.items()
    ]
    feasible = [one for one in trials if one.feasible]
    if not feasible:
        raise BudgetError(impossible(limits, estimated))
    points = [
        (*(getattr(one.figures, cost) for cost in config.costs), -one.estimate) for one in feasible
    ]
    indices = non_dominated(points)
    keep = min(indices, key=lambda index: preference(feasible[index], config.costs[0], limits))
    chosen = [feasible[index] for index in thin(indices, config.test_front, keep=keep)]
    with objective.clock.during("test scores"):
        *scores, of_full = _scores(study, chosen, objective, test)
    here_too = timetables[None].target.device == here.device
    with objective.clock.during("timing the front"):
        measured = _times(study, chosen, objective, measure=here_too)
    best = best_of(chosen, measured, config.costs[0], limits)
    members = [
        Member(
            **vars(one),
            name=f"front-{number}",
            test=score,
            full_correct=of_full[CORRECT],
            measured=timing,
            best=number == best,
        )
        for number, (one, score, timing) in enumerate(zip(chosen, scores, measured, strict=True), 1)
    ]
    cut = objective.net.space
    front = Front(
        run, members, objective.full, trials, config.costs, limits, timetables, cut,
        belief.effects[: len(cut.groups)], foreseen,
    )  # fmt: skip
    device = str(objective.net.model.device)
    about = {"settings": shown(config), "importance_trust": belief.trust, **provenance(device)}
    about["foresight"] = foreseen and asdict(foreseen)
    about["seconds"] = objective.clock.seconds()
    with busy("writing the front"), waiting(run.search, "writes its front"):
        front.save()
        write_page(front)
        write_json(run.search / "about.json", about)
    return front


def shown(config: SearchConfig) -> dict[str, Any]:
    """The settings of a search, as they may be kept and sent on."""
    settings = as_plain(config)
    if config.study.storage:
        settings["study"]["storage"] = without_password(config.study.storage)
    return settings


def preference(one: Evaluated, cost: str, limits: Mapping[str, float]) -> tuple[float, float]:
    """To be minimised. What a budget limits is met, and what it does not is made the best of: where
    it limits accuracy alone the cheapest is wanted, else the most accurate."""
    amount = getattr(one.figures, cost)
    cheapest = limits_accuracy_alone(limits)
    return (amount, -one.estimate) if cheapest else (-one.estimate, amount)


def best_of(
    chosen: Sequence[Evaluated],
    measured: Sequence[Measured | None],
    cost: str,
    limits: Mapping[str, float],
) -> int:
    """The number (from 1) of the preferred one among those that are not certainly over the budget
    as measured, as predicted where that cannot be trusted; if all are, of the cheapest, the first.
    """

    def meets(number: int) -> bool:
        figures, timing = chosen[number - 1].judged, measured[number - 1]
        if timing and timing.trusted:
            figures = timing.at_least().instead_of(figures)
        return met(figures, limits)

    numbers = [number for number in range(1, len(chosen) + 1) if meets(number)]
    return min(numbers, key=lambda n: preference(chosen[n - 1], cost, limits), default=1)


def _scores(
    study: optuna.Study, chosen: Sequence[Evaluated], objective: Objective, test: Sequence[Example]
) -> list[dict[str, Any]]:
    """On the test split, fitted to the full model where that is better, and what says so; last that
    of the full model itself."""
    # A study of an earlier version says nothing of single examples.
    known = {
        name: score for name, score in study.user_attrs.get(SCORES, {}).items() if CORRECT in score
    }
    full = objective.space.maximal()
    everyone = {full: Compensated(), **{one.candidate: one.figures.made_up for one in chosen}}
    asked = [candidate for candidate in everyone if str(candidate) not in known]
    say(f"Scoring {len(asked)} on {len(test)} test examples: the front, and the full model")
    for candidate in track(asked, "test split"):
        made_up, small = objective.held_out.refined(candidate.sub_adapter, everyone[candidate])
        score = evaluate(
            objective.rounded(small, candidate), objective.tokenizer, test,
            batch_tokens=objective.config.batch_tokens, label="scoring",
        )  # fmt: skip
        known[str(candidate)] = {**score.kept(), COMPENSATION: made_up.as_dict()}
        told = said_by(objective.net, objective.tokenizer, candidate.sub_adapter, test)
        if told:
            known[str(candidate)][VOCABULARY] = told.as_dict()
        study.set_user_attr(SCORES, known)
    return [known[str(candidate)] for candidate in (*(one.candidate for one in chosen), full)]


def _times(
    study: optuna.Study, chosen: Sequence[Evaluated], objective: Objective, *, measure: bool
) -> list[Measured | None]:
    """As measured on the target; None where that was never done. What could not be trusted is
    measured again."""
    known = {sub: Measured(**each) for sub, each in study.user_attrs.get(TIMES, {}).items()}
    trusted = {sub for sub, each in known.items() if each.trusted}
    asked = [one for one in chosen if measure and str(one.candidate) not in trusted]
    if asked:
        assert objective.full is not None
        say(f"Timing {len(asked)} of the front")
        with Bench(objective.net, objective.config.timing, objective.config.seed) as bench:
            timed = bench.together([one.candidate for one in asked], "timing")
        for one, found in zip(asked, timed, strict=True):
            known[str(one.candidate)] = Measured.of(found, objective.full)
        study.set_user_attr(TIMES, {sub: asdict(each) for sub, each in known.items()})
    return [known.get(str(one.candidate)) for one in chosen]
