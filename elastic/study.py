"""Searches a super-adapter with Optuna: stored in a journal file, resumed by running it again."""

from __future__ import annotations

import importlib.util
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import optuna
from optuna import samplers
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError

from elastic import models
from elastic.cost import Counter
from elastic.errors import BudgetError, MissingExtra, RunError
from elastic.evaluate import evaluate
from elastic.files import digest, read_json, write_json
from elastic.front import Evaluated, Front, Member
from elastic.merging import compact
from elastic.objective import Figures, Objective
from elastic.page import write_page
from elastic.pareto import non_dominated, thin
from elastic.progress import say, search_bar, track
from elastic.proposals import AdditiveSampler, learn
from elastic.run import Run, as_plain, differences
from elastic.sampler import generator_for
from elastic.search_config import BudgetConfig, SearchConfig
from elastic.space import BoundSpace, SubAdapter
from elastic.supernet import FACTORS, provenance
from elastic.tasks import load_task
from elastic.workers import Worker, open_storage

POLL = 0.5
"""Seconds between looks at what other workers have done."""
AT_LEAST = ("min_accuracy", "tokens_per_second")
"""Limits from below; the others are from above."""
FAILURES = 3
"""Trials in a row without figures that end the search."""
PATIENCE = 200
"""Proposals in a row that were all seen before; then the sampler has nothing new to offer."""


def search(config: SearchConfig) -> Front:
    """Evaluate sub-adapters up to `config.trials`, write the front below RUN/search, return it.

    BudgetError when no sub-adapter meets the budget: before weights load if counting shows it,
    after the two extremes if their latency shows it, else at the end.
    """
    run = Run(config.run)
    trained = run.config()
    models.decoder_only(trained.model, "search")
    if run.sub_adapter.is_file():
        raise RunError(
            f"{run.path} trained one sub-adapter alone; there is nothing to search. Run: "
            f"elastic export {run.path}"
        )
    _refuse_by_counting(run, config.budget, trained)
    task = load_task(trained.task, trained.seed)
    study = _open_study(run, config)
    with Worker(study) as worker:
        _, base, net = run.load()
        objective = Objective(net, base.tokenizer, task.validation, config)
        _prepare(study, worker, objective, config)
        limits = config.budget.resolved(objective.full.budget_values())
        done = len(study.get_trials(deepcopy=False))
        study.sampler = _sampler(config, net.space, limits, len(task.validation), done)
        try:
            results = _evaluate(study, worker, objective, limits, config)
        except KeyboardInterrupt:
            results = _seen(study, net.space)
            if any(_met(figures, limits) for figures in results.values()):
                say(f"Interrupted: writing the front of {len(results)} sub-adapters")
                _front(run, config, results, objective, limits, task.test, base.tokenizer)
            raise
        return _front(run, config, results, objective, limits, task.test, base.tokenizer)


def _open_study(run: Run, config: SearchConfig) -> optuna.Study:
    """The study of that name; RunError when it was made with other settings."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    storage = open_storage(config.study.storage, run.search)
    study = optuna.create_study(
        study_name=config.study.name or run.path.resolve().name,
        storage=storage,
        load_if_exists=True,
        directions=["maximize", "minimize"],
    )
    # What was evaluated serves any budget, and more trials continue a study. What changes the
    # meaning of its figures makes it another one.
    settings = as_plain(config)
    for name in ("run", "study", "budget", "trials", "test_front", "batch_tokens"):
        settings.pop(name)
    mine = {"settings": settings, **_subject(run)}
    for name, value in mine.items():
        stored = study.user_attrs.get(name)
        if stored is None:
            study.set_user_attr(name, value)
        elif stored != value:
            what = ", ".join(differences(value, stored)[:4])
            where = config.study.storage or str(run.search)
            raise RunError(
                f"{where} holds a search with other {name}: {what}; give another study.name, or "
                f"delete {where} to start anew"
            )
    study.set_metric_names(["accuracy", config.latency])  # for optuna-dashboard
    return study


def _subject(run: Run) -> dict[str, Any]:
    """What the figures of a study are figures of."""
    trained = as_plain(run.config())
    about = read_json(run.super_adapter / "about.json")
    return {
        "task": {"task": trained["task"], "seed": trained["seed"]},
        "super-adapter": {
            "base": about["base_digest"],
            "space": run.space().as_dict(),
            "factors": digest(run.super_adapter / FACTORS),
        },
    }


def _prepare(
    study: optuna.Study, worker: Worker, objective: Objective, config: SearchConfig
) -> None:
    """Measure the full model and line up the first trials, once per study, by its leader."""
    while "full" not in study.user_attrs:
        if worker.leads():
            say("Measuring the full model")
            full = objective.measure_full().as_dict()
            _enqueue_starts(study, objective.net.space, config)
            study.set_user_attr("full", full)
        else:
            time.sleep(POLL)
    objective.full = Figures(**study.user_attrs["full"])


def _evaluate(
    study: optuna.Study,
    worker: Worker,
    objective: Objective,
    limits: Mapping[str, float],
    config: SearchConfig,
) -> dict[SubAdapter, Figures]:
    """Ask, measure, tell, until the study has its sub-adapters; those of other workers count."""
    space = objective.net.space
    wanted = min(config.trials, space.size)
    results = _seen(study, space)
    if results:
        say(f"Continuing after {len(results)} sub-adapters")
    repeats = failures = 0
    with search_bar(config.trials, len(results)) as advance:
        while repeats < PATIENCE:
            others = len(worker.running())
            results = _seen(study, space)
            if len(results) >= wanted:
                break
            if len(results) + others >= wanted:
                time.sleep(POLL)
                continue
            try:
                trial = study.ask()
                worker.take(trial)
                # NSGA-II takes an enqueued trial into its population only if it was asked first.
                trial.relative_params  # noqa: B018
                sub = _suggest(trial, space)
                repeats = repeats + 1 if sub in results else 0
                if worker.gives_way(trial):
                    continue
            except UpdateFinishedTrialError:  # by another worker that had been given it too
                continue
            # The same sub-adapter proposed twice is evaluated once.
            figures = results.get(sub) or objective(sub)
            failures = 0 if _tell(study, trial, figures, limits, config.latency) else failures + 1
            if failures > FAILURES:
                raise RunError(f"{failures} sub-adapters in a row have no figures: {figures}")
            if sub not in results and not failures:
                results[sub] = figures
                advance(len(results), figures)
                _refuse_by_extremes(results, space, limits)
    return results


def _sampler(
    config: SearchConfig,
    space: BoundSpace,
    limits: Mapping[str, float],
    examples: int,
    done: int,
) -> optuna.samplers.BaseSampler:
    # A resumed study must not draw the numbers of its first trials again.
    seed = config.seed + done
    match config.sampler:
        case "additive":
            limit = limits.get(config.latency)
            if config.latency == "decode_ms" and "tokens_per_second" in limits:
                slowest = 1000 * config.timing.batch / limits["tokens_per_second"]
                limit = min(slowest, limit or slowest)
            return AdditiveSampler(space, examples=examples, limit=limit, seed=config.seed)
        case "nsga2":
            return samplers.NSGAIISampler(population_size=config.population, seed=seed)
        case "nsga3":
            return samplers.NSGAIIISampler(population_size=config.population, seed=seed)
        case "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=config.starts)
        case "gp":
            if importlib.util.find_spec("scipy") is None:
                raise MissingExtra("scipy", "gp", "sampler gp")
            return samplers.GPSampler(seed=seed, n_startup_trials=config.starts)
        case "random":
            return samplers.RandomSampler(seed=seed)


def _suggest(trial: optuna.Trial, space: BoundSpace) -> SubAdapter:
    """Indices into the descending choices: stable names, and an order NSGA-II can cross."""
    return space.at({g.name: trial.suggest_int(g.name, 0, len(g.choices) - 1) for g in space})


def _tell(
    study: optuna.Study,
    trial: optuna.Trial,
    figures: Figures,
    limits: Mapping[str, float],
    latency: str,
) -> bool:
    """Whether the figures are numbers; a trial without has failed, and the search goes on."""
    if not all(math.isfinite(value) for value in figures.as_dict().values()):
        say(f"Trial {trial.number} failed: {figures}")
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return False
    trial.set_user_attr("figures", figures.as_dict())
    for name, amount in violations(figures, limits).items():
        trial.set_constraint(name, amount)
    study.tell(trial, [figures.accuracy, getattr(figures, latency)])
    return True


def violations(figures: Figures, limits: Mapping[str, float]) -> dict[str, float]:
    """Amount past each limit; at most 0 is met (Optuna's sign)."""
    values = figures.budget_values()
    return {
        name: limit - values[name] if name in AT_LEAST else values[name] - limit
        for name, limit in limits.items()
    }


def _met(figures: Figures, limits: Mapping[str, float]) -> bool:
    return all(amount <= 0 for amount in violations(figures, limits).values())


def _seen(study: optuna.Study, space: BoundSpace) -> dict[SubAdapter, Figures]:
    """Everything evaluated so far, in order, each once."""
    results: dict[SubAdapter, Figures] = {}
    for trial in study.get_trials(deepcopy=False):
        if "figures" in trial.user_attrs and trial.state.is_finished():
            results.setdefault(space.at(trial.params), Figures(**trial.user_attrs["figures"]))
    return results


def _enqueue_starts(study: optuna.Study, space: BoundSpace, config: SearchConfig) -> None:
    """The two extremes, the ladder between them, then stratified sub-adapters."""
    starts = dict.fromkeys([space.maximal(), space.minimal(), *space.ladder()])
    generator = generator_for(config.seed, "starts")
    for _ in range(20 * config.starts):
        if len(starts) >= config.starts:
            break
        starts[space.stratified(generator)] = None
    for sub in list(starts)[: config.starts]:
        study.enqueue_trial(space.indices(sub), skip_if_exists=True)


def _refuse_by_counting(run: Run, budget: BudgetConfig, trained) -> None:
    """BudgetError when params or macs cannot be met, from the architecture alone."""
    exact = {name for name in ("params", "macs") if name in budget.limits()}
    if not exact:
        return
    model = models.skeleton(trained.model)
    space = run.space().bind(model, trained.adapter.rank)
    counter = Counter(model, space)
    smallest, full = counter(space.minimal()), counter.full
    others = dict.fromkeys(budget.limits(), 0.0) | {"min_accuracy": 0.0}
    limits = budget.resolved({**others, "params": full.params, "macs": full.macs})
    for name in exact:
        if getattr(smallest, name) > limits[name]:
            raise BudgetError(
                f"budget.{name} {limits[name]:.4g} is below the minimal sub-adapter's "
                f"{getattr(smallest, name):.4g} (the full model has {getattr(full, name):.4g}); "
                "raise it, or train a space with smaller choices"
            )


def _refuse_by_extremes(
    results: Mapping[SubAdapter, Figures], space: BoundSpace, limits: Mapping[str, float]
) -> None:
    """BudgetError as soon as the minimal sub-adapter is slower than the budget."""
    if len(results) != 2 or space.minimal() not in results:
        return
    fastest = results[space.minimal()]
    over = {
        name: amount
        for name, amount in violations(fastest, limits).items()
        if name in ("prefill_ms", "decode_ms", "tokens_per_second") and amount > 0.1 * limits[name]
    }
    if over:
        raise BudgetError(_impossible(limits, results, space))


def _impossible(
    limits: Mapping[str, float], results: Mapping[SubAdapter, Figures], space: BoundSpace
) -> str:
    def described(figures: Figures) -> str:
        return (
            f"{figures.accuracy:.1%} on validation, prefill {figures.prefill_ms:.1f} ms, "
            f"decode {figures.decode_ms:.1f} ms, {figures.params / 1e6:.1f} M parameters"
        )

    wanted = ", ".join(f"{name} {limit:.4g}" for name, limit in limits.items())
    fastest = min(results.values(), key=lambda figures: figures.prefill_ms)
    best = max(results.values(), key=lambda figures: figures.accuracy)
    return (
        f"no sub-adapter meets the budget ({wanted}). The fastest: {described(fastest)}. "
        f"The most accurate: {described(best)}."
    )


def _front(
    run: Run,
    config: SearchConfig,
    results: dict[SubAdapter, Figures],
    objective: Objective,
    limits: Mapping[str, float],
    test,
    tokenizer,
) -> Front:
    """Non-dominated sub-adapters within the budget, scored on the test split and saved."""
    space, examples = objective.net.space, objective.full.accuracy_n
    accuracies = {sub: figures.accuracy for sub, figures in results.items()}
    belief = learn(space, accuracies, examples)
    trials = [
        Evaluated(sub, figures, estimate, _met(replace(figures, accuracy=estimate), limits))
        for (sub, figures), estimate in zip(results.items(), belief.fitted.tolist(), strict=True)
    ]
    feasible = [one for one in trials if one.feasible]
    if not feasible:
        raise BudgetError(_impossible(limits, results, space))
    points = [(getattr(one.figures, config.latency), -one.estimate) for one in feasible]
    indices = non_dominated(points)
    # The slowest of the front is its most accurate: the best.
    kept = thin(indices, config.test_front, keep=indices[-1])
    chosen = [feasible[index] for index in kept]
    members = []
    say(f"Scoring {len(chosen)} of the front on {len(test)} test examples")
    for number, one in enumerate(track(chosen, "test split"), 1):
        score = evaluate(
            compact(objective.net, one.sub_adapter),
            tokenizer,
            test,
            batch_tokens=config.batch_tokens,
            quiet=True,
        )
        best = number == len(chosen)
        members.append(Member(**vars(one), name=f"front-{number}", test=score.as_dict(), best=best))
    front = Front(
        run, members, objective.full, trials, config.latency, limits, tuple(objective.warnings)
    )
    front.save()
    write_page(front, space, belief.effects, run.report)
    device = str(objective.full_model.device)
    write_json(run.search / "about.json", {"settings": as_plain(config), **provenance(device)})
    return front
