"""From everything evaluated to the front: who is on it, its test accuracy and its real latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from elastic.bench import Bench
from elastic.budget import impossible, met
from elastic.errors import BudgetError
from elastic.evaluate import evaluate
from elastic.files import write_json
from elastic.front import Evaluated, Front, Measured, Member
from elastic.merging import compact
from elastic.objective import Figures, Objective
from elastic.page import write_page
from elastic.pareto import non_dominated, thin
from elastic.progress import say, track
from elastic.proposals import learn
from elastic.run import Run, as_plain
from elastic.search_config import SearchConfig
from elastic.space import SubAdapter
from elastic.supernet import provenance
from elastic.tasks import Example
from elastic.timetable import Target


def finish(
    run: Run,
    config: SearchConfig,
    objective: Objective,
    results: Mapping[SubAdapter, Figures],
    *,
    test: Sequence[Example],
    here: Target,
    importance: Mapping[str, float] | None = None,
) -> Front:
    """Non-dominated sub-adapters within the budget, scored on the test split, timed for real where
    this is the target, and saved."""
    net, timetable = objective.net, objective.timetable
    accuracies = {sub: figures.accuracy for sub, figures in results.items()}
    belief = learn(net.space, accuracies, len(objective.examples), importance)
    estimated = {
        sub: replace(figures, accuracy=estimate)
        for (sub, figures), estimate in zip(results.items(), belief.fitted.tolist(), strict=True)
    }
    full = estimated.get(net.space.maximal(), objective.full)
    limits = config.budget.resolved(full.budget_values())
    trials = [
        Evaluated(sub, results[sub], figures.accuracy, met(figures, limits))
        for sub, figures in estimated.items()
    ]
    feasible = [one for one in trials if one.feasible]
    if not feasible:
        raise BudgetError(impossible(limits, estimated))
    points = [(getattr(one.figures, config.objective), -one.estimate) for one in feasible]
    indices = non_dominated(points)
    # The slowest of the front is its most accurate.
    chosen = [feasible[index] for index in thin(indices, config.test_front, keep=indices[-1])]
    say(f"Scoring {len(chosen)} of the front on {len(test)} test examples")
    scores = [
        evaluate(
            compact(net, one.sub_adapter), objective.tokenizer, test,
            batch_tokens=config.batch_tokens, quiet=True,
        )
        for one in track(chosen, "test split")
    ]  # fmt: skip
    measured: list[Measured | None] = [None] * len(chosen)
    if timetable.target.device == here.device:
        say(f"Timing {len(chosen)} of the front")
        with Bench(net, config.timing, config.seed) as bench:
            found = [bench(one.sub_adapter) for one in track(chosen, "timing")]
        measured = [Measured.of(each, objective.full) for each in found]
    best = best_of(chosen, measured, limits)
    members = [
        Member(
            **vars(one),
            name=f"front-{number}",
            test=score.as_dict(),
            measured=timing,
            best=number == best,
        )
        for number, (one, score, timing) in enumerate(zip(chosen, scores, measured, strict=True), 1)
    ]
    front = Front(run, members, objective.full, trials, config.objective, limits, timetable)
    front.save()
    write_page(front, net.space, belief.effects, run.report)
    device = str(net.model.device)
    about = {"settings": as_plain(config), "importance_trust": belief.trust, **provenance(device)}
    write_json(run.search / "about.json", about)
    return front


def best_of(
    chosen: Sequence[Evaluated], measured: Sequence[Measured | None], limits: Mapping[str, float]
) -> int:
    """The number (from 1, the fastest) of the most accurate one that meets the budget as measured
    too, where that can be trusted; if none does, of the fastest."""
    for number in reversed(range(len(chosen))):
        judged, timing = chosen[number].judged, measured[number]
        if timing is None or not timing.trusted or met(timing.instead_of(judged), limits):
            return number + 1
    return 1
