"""Searches a super-adapter with Optuna: stored in a journal file, resumed by running it again."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna import samplers
from optuna.study import StudyDirection

from elastic import trackers
from elastic.config import CompensationConfig, SearchConfig, TaskConfig
from elastic.config.model import of_earlier_version
from elastic.config.search import ACCURACY, limits_accuracy_alone, without_password
from elastic.console import counting, say, track
from elastic.data.collating import collated
from elastic.data.encoding import encode_all
from elastic.data.task import Example
from elastic.errors import BudgetError, MissingExtra, RunError
from elastic.files import digest
from elastic.formats import compression
from elastic.latency.runtime import require_runtime, timing_of
from elastic.latency.target import Target
from elastic.run import MOVABLE, Run, as_plain, differences
from elastic.searching import screening
from elastic.searching.budget import (
    refuse_by_counting,
    refuse_by_extremes,
    refuse_decoding,
    room,
)
from elastic.searching.finalists import finish, shown
from elastic.searching.front import Front
from elastic.searching.loop import Loop, enqueue_starts
from elastic.searching.objective import Figures, Objective
from elastic.searching.sampler import AdditiveSampler
from elastic.searching.tables import read_tables, require_same_tables, tables_of
from elastic.searching.wall_clock import WallClock
from elastic.searching.workers import Worker, experimental, open_storage
from elastic.spaces.dims import BITS
from elastic.supernet.examples import digests_of, task_of
from elastic.supernet.group_importance import group_importance
from elastic.supernet.held_out import HeldOut
from elastic.supernet.store import FACTORS, load_run, read_about
from elastic.supernet.supernet import Supernet
from elastic.trackers import Reports

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


IMPORTANCE_BATCH = 8
UNRELATED = (
    "run", "study", "budget", "trials", "importance_examples", "test_front", "batch_tokens",
    "table", "recover", "report_to",
)  # fmt: skip
"""Settings that change no figure of a trial."""


def search(config: SearchConfig) -> Front:
    """Evaluate sub-adapters up to `config.trials`, write the front below RUN/search, return it.

    BudgetError when no sub-adapter meets the budget: before weights load if counting shows it,
    after the two extremes if their latency shows it, else at the end. RunError where there is
    nothing to search, MissingExtra for a sampler or a tracker that is not installed.
    """
    clock = WallClock()
    run = Run(config.run)
    trained = run.config()
    config = replace(config, timing=timing_of(config.timing, trained.model))
    if not config.timing.new_tokens:
        refuse_decoding(config)
    if run.sub_adapter.is_file():
        raise RunError(
            f"{run.path} trained one sub-adapter alone; there is nothing to search. Run: "
            f"elastic export {run.path}"
        )
    if config.sampler == "gp" and importlib.util.find_spec("scipy") is None:
        raise MissingExtra("scipy", "gp", "sampler gp")
    trackers.require(config.report_to)
    require_runtime(config.timing.runtime, trained.model)
    refuse_by_counting(run, config.budget, trained)
    for mode in config.compress:
        compression.check(mode, config.timing.runtime)
    targets: dict[str | None, Target] = {
        mode: Target.of(run, config.timing, mode) for mode in (None, *config.compress)
    }
    given = read_tables(config.table, targets)
    task = task_of(run)
    study, config = _open_study(run, config)
    require_same_tables(study, given)
    name = f"{study.study_name}-search"
    reports = Reports(config.report_to, run.search, name, shown(config))
    with Worker(study) as worker, reports:
        _, base, net = load_run(run)
        if net.space.size == 1 and not config.compress:
            raise RunError(
                f"{run.path}: its space has one sub-adapter; there is nothing to search. Run: "
                f"elastic export {run.path} --sub_adapter maximal"
            )
        with clock.during("latency table"):
            timetables = tables_of(worker, net, targets, given, config)
        held_out = HeldOut.of(run, net, base.tokenizer, task, config.compensation)
        objective = Objective(
            net, base.tokenizer, task.validation, config, timetables, held_out, clock
        )
        importance = parts = None
        if rows := screening.rows_of(config, objective):
            ask = functools.partial(screening.screened, study, objective, rows)
            with clock.during("screening"):
                parts = screening.parts(worker.once("screened", ask))
        if config.sampler == "additive" and config.importance_examples and parts is None:
            asked = task.train[: config.importance_examples]
            measured = functools.partial(_importance, net, base.tokenizer, asked)
            with clock.during("importances"):
                importance = {BITS: 1.0, **worker.once("importance", measured)}
        starts = 2 if parts is not None else config.starts
        begin = functools.partial(_begun, study, objective, config, starts)
        objective.full = Figures(**worker.once("full", begin))
        limits = config.budget.resolved(objective.full.budget_values())
        done = len(study.get_trials(deepcopy=False))
        study.sampler = _sampler(config, objective, limits, importance, parts, done)
        write = functools.partial(
            finish, run, config, objective, study, test=task.test, here=targets[None],
            importance=importance, parts=parts,
        )  # fmt: skip
        loop = Loop(
            study, objective.space, worker, config.chosen_objectives, "figures",
            lambda _, kept: Figures(**kept), clock,
        )  # fmt: skip
        try:
            _evaluate(loop, objective, limits, config.trials, reports)
        except KeyboardInterrupt:
            if results := loop.seen():
                say(f"Interrupted: writing the front of {len(results)} sub-adapters")
                with contextlib.suppress(BudgetError):
                    write(results)
            raise
        # One after another: workers on one machine would spoil each other's times.
        worker.wait_to_lead()
        results = loop.seen()
        front = write(results)
        reports.log(front.figures(), len(results) + 1)
        say(f"The search took {clock}")
        return front


def _open_study(run: Run, config: SearchConfig) -> tuple[optuna.Study, SearchConfig]:
    """The study of that name, and the settings with its objective; RunError when it was made with
    others."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(config.study.storage, run.search)
    costs = [StudyDirection.MINIMIZE] * (len(config.chosen_objectives) - 1)
    study = optuna.create_study(
        study_name=config.study.name or run.path.resolve().name,
        storage=storage,
        load_if_exists=True,
        directions=[StudyDirection.MAXIMIZE, *costs],
    )
    # What was evaluated serves any budget, and more trials continue a study. What changes the
    # meaning of its figures makes it another one.
    begun = study.user_attrs.get("settings", {}).get("objectives", [])
    config = replace(config, objectives=config.objectives or begun)
    config = replace(config, objectives=config.chosen_objectives)  # in one order
    settings = as_plain(config)
    for name in UNRELATED:
        settings.pop(name)
    before = study.user_attrs.get("settings", settings)
    if "compensation" not in before:  # of an earlier version, which made up for nothing
        settings.pop("compensation")
        config = replace(config, compensation=CompensationConfig(degrees=[0.0]))
    if "screen" not in before:  # of an earlier version, which tried nothing alone
        settings.pop("screen")
        config = replace(config, screen=0)
    mine = {"settings": settings, **_subject(run)}
    # Where rows are does not matter once it is known which they are.
    places = MOVABLE if "rows" in study.user_attrs else ()
    for name, value in mine.items():
        stored = study.user_attrs.get(name)
        if stored is None:
            study.set_user_attr(name, value)
            continue
        if name == "task":
            stored, value = _as_now(stored, places), _as_now(value, places)
        if stored != value:
            what = ", ".join(differences(value, stored)[:4])
            where = without_password(config.study.storage or str(run.search))
            raise RunError(
                f"{where} holds a search with other {name}: {what}; give another study.name, or "
                f"delete {where} to start anew"
            )
    with experimental():
        study.set_metric_names([*config.chosen_objectives])  # for optuna-dashboard
    return study, config


def _as_now(stored: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
    """What a study keeps of its task, with the settings that versions since have added."""
    task = stored["task"]
    if "draw" not in task:
        task = as_plain(TaskConfig(**of_earlier_version(task)))
    kept = {name: value for name, value in task.items() if f"task.{name}" not in without}
    return {**stored, "task": kept}


def _subject(run: Run) -> dict[str, Any]:
    """What the figures of a study are figures of."""
    trained = as_plain(run.config())
    about = read_about(run.super_adapter)
    known = digests_of(run)
    rows = {split: known["splits"][split]["texts"] for split in ("validation", "test")}
    return {
        "task": {"task": trained["task"], "seed": trained["seed"]},
        "rows": {**rows, **known["tokenizer"]},
        "super-adapter": {
            "base": about["base_digest"],
            "space": run.space().as_dict(),
            "factors": digest(run.super_adapter / FACTORS),
        },
    }


def _importance(
    net: Supernet, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> dict[str, float]:
    """Of every group, from the gradients of some training examples."""
    sequences = encode_all(tokenizer, examples, net.model)
    say(f"Asking the gradients of {len(sequences)} training examples what matters")
    batches = list(collated(sequences, IMPORTANCE_BATCH, tokenizer.pad_token_id, net.model.device))
    return group_importance(net, track(batches, "gradients"))


def _begun(
    study: optuna.Study, objective: Objective, config: SearchConfig, starts: int
) -> dict[str, Any]:
    """Figures of the full model; the first trials are lined up."""
    say("Scoring the full model")
    full = objective.figures(objective.space.maximal(), {}).as_dict()
    enqueue_starts(study, objective.space, starts, config.seed)
    return full


def _evaluate(
    loop: Loop[Figures],
    objective: Objective,
    limits: Mapping[str, float],
    trials: int,
    reports: Reports,
) -> None:
    """Show and report what comes."""
    if before := len(loop.seen()):
        say(f"Continuing after {before} sub-adapters")
    check = functools.partial(refuse_by_extremes, objective=objective, limits=limits)
    with counting("searching", min(trials, loop.space.size), before) as steps:
        for count, figures in loop.run(objective, trials, limits, check):
            last = f"{figures.accuracy:.1%} at {figures.prefill_ms:.0f} ms"
            steps.to(count, f"searching, last {last}")
            reports.log({f"search/{k}": v for k, v in figures.numbers().items()}, count)


def _sampler(
    config: SearchConfig,
    objective: Objective,
    limits: Mapping[str, float],
    importance: Mapping[str, float] | None,
    parts: np.ndarray | None,
    done: int,
) -> optuna.samplers.BaseSampler:
    # A resumed study must not draw the numbers of its first trials again.
    seed = config.seed + done
    match config.sampler:
        case "additive":
            return AdditiveSampler(
                objective.space,
                examples=len(objective.examples),
                room=room(limits, objective),
                tables=[objective.table(cost) for cost in config.costs],
                tradeoff=config.objectives != [ACCURACY] or limits_accuracy_alone(limits),
                importance=importance,
                parts=parts,
                seed=config.seed,
            )
        case "nsga2":
            return samplers.NSGAIISampler(population_size=config.population, seed=seed)
        case "nsga3":
            with experimental():
                return samplers.NSGAIIISampler(population_size=config.population, seed=seed)
        case "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=config.starts)
        case "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=config.starts)
        case "random":
            return samplers.RandomSampler(seed=seed)
