"""A search is repeatable and honest about what it asks. Latency is a function of the parameter
count here; accuracy is real."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.samplers import NSGAIIISampler, NSGAIISampler

from elastic import __main__
from elastic.config import BudgetConfig, SearchConfig, StudyConfig
from elastic.errors import ConfigError, MissingExtra, RunError
from elastic.evaluation.statistics import Score
from elastic.searching import objective, study
from elastic.searching.objective import Objective
from elastic.searching.study import search
from tests.helpers.searches import (
    config,
    front_of,
    trained_run,
    trials_of,
)
from tests.helpers.tiny import ATTENTION, GATE_UP
from tests.helpers.tiny_runs import copy_run

pytestmark = pytest.mark.usefixtures("fake_latency")


@pytest.mark.parametrize(
    "sampler",
    ["additive", "nsga2"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("nsga3", "tpe", "gp", "random")],
)
def test_same_seed_same_front(trained, tmp_path, sampler):
    found, trials = [], 7 if sampler == "gp" else 10  # each a second's fit
    for name in ("one", "two"):
        run = copy_run(trained, tmp_path / name)
        budget = BudgetConfig(prefill_ms="95%")
        search(config(run, trials=trials, sampler=sampler, seed=5, budget=budget))
        assert len(trials_of(run)) == trials
        found.append((front_of(run), trials_of(run)))
    assert found[0] == found[1]


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3"])
def test_the_first_trials_are_of_a_population_though_it_did_not_propose_them(
    trained, tmp_path, sampler
):  # fmt: skip
    run = copy_run(trained, tmp_path / "run")
    wanted = config(run, trials=6, sampler=sampler)
    search(wanted)
    found, _ = study._open_study(run, wanted)
    kind = {"nsga2": NSGAIISampler, "nsga3": NSGAIIISampler}[sampler]
    first = kind(population_size=wanted.population).get_population(found, 0)
    assert {trial.number for trial in first} >= set(range(wanted.starts))


def test_another_seed_visits_others(trained, tmp_path):
    visited = []
    for seed in (5, 6):
        run = copy_run(trained, tmp_path / str(seed))
        search(config(run, trials=4, starts=2, sampler="random", seed=seed))
        visited.append([row["sub_adapter"] for row in trials_of(run)])
    assert visited[0] != visited[1]


def test_a_repeated_sub_adapter_is_evaluated_once(trained, tmp_path, asked, monkeypatch):
    enqueue = study.enqueue_starts

    def twice(found, space, *settings):
        enqueue(found, space, *settings)
        for sub in (space.minimal(), space.maximal(), space.minimal()):
            found.enqueue_trial(space.indices(sub))

    monkeypatch.setattr(study, "enqueue_starts", twice)
    run = copy_run(trained, tmp_path / "run")
    search(config(run))
    assert len(asked) == 8 == len(set(asked))
    assert len(trials_of(run)) == 8


def test_a_small_space_is_evaluated_in_full_and_the_search_ends(tiny_folder, tmp_path, asked):
    width = {"dim": "width", "outputs": GATE_UP, "inputs": ["mlp.down_proj"], "choices": [64, 32]}
    declared = {"blocks": "model.layers.*", "adapt": ATTENTION, "groups": {"mlp_width": width}}
    run = trained_run(tiny_folder, tmp_path, declared)
    front = search(config(run, trials=50, sampler="random"))
    assert len(asked) == 4 == len(set(asked)) == len(front.trials)


def test_a_tracker_gets_every_trial_and_the_front(trained, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = copy_run(trained, tmp_path / "run")
    front = search(config(run, trials=4, report_to=["tensorboard"]))
    events = EventAccumulator(str(run.search / "tensorboard"))
    events.Reload()

    def logged(tag):
        return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]

    for name in ("accuracy", "prefill_ms", "params"):
        mine = [getattr(one.figures, name) for one in front.trials]
        assert logged(f"search/{name}") == list(enumerate(mine, 1))
    for member in front.members:
        assert logged(f"{member.name}/test_accuracy") == [(5, member.test["accuracy"])]
    assert logged("best/prefill_ms") == [(5, front.best.figures.prefill_ms)]
    # It is no setting of the study: going on without it is the same search.
    search(config(run, trials=5))


def test_a_search_refuses_a_tracker_that_is_missing_before_weights(
    trained, monkeypatch, forbid_weights
):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingExtra, match=r"elastic-adapters\[mlflow\]"):
        search(config(trained, report_to=["mlflow"]))
    with pytest.raises(ConfigError, match="did you mean 'mlflow'"):
        config(trained, report_to=["mlfow"])


def test_a_run_whose_name_reads_like_markup_is_searched(trained, tmp_path, capsys):
    run = copy_run(trained, tmp_path / "a[" / "b]")
    search(config(run, trials=2)).show()
    assert f"{run.path}/search/front.png" in capsys.readouterr().out.replace("\n", "")


def test_the_password_of_a_storage_is_not_kept(trained, tmp_path, monkeypatch):
    run = copy_run(trained, tmp_path / "run")
    opened = study.open_storage
    monkeypatch.setattr(study, "open_storage", lambda _, folder: opened(None, folder))
    url = "postgresql+psycopg://me:secret@host/database"
    storage = StudyConfig(storage=url)
    search(config(run, trials=2, study=storage, report_to=["tensorboard"]))
    kept = json.loads((run.search / "about.json").read_text())["settings"]["study"]["storage"]
    assert kept == "postgresql+psycopg://me:***@host/database"
    for path in filter(Path.is_file, run.path.rglob("*")):
        assert b"secret" not in path.read_bytes(), path
    with pytest.raises(RunError, match=r"me:\*\*\*@host/database holds a search"):
        search(config(run, study=StudyConfig(storage=url), seed=1))


@pytest.mark.parametrize("right", [False, True])
def test_what_is_believed_of_an_accuracy_is_a_share(trained, tmp_path, monkeypatch, right):
    def evaluated(model, tokenizer, examples, **_):
        return Score((right,) * len(examples))

    monkeypatch.setattr(objective, "evaluate", evaluated)
    front = search(config(copy_run(trained, tmp_path / "run"), trials=8, starts=6))
    assert all(0 <= one.estimate <= 1 for one in front.trials)


def test_figures_that_are_no_numbers_fail_their_trial_alone(trained, tmp_path, monkeypatch):
    run, call, calls = copy_run(trained, tmp_path / "run"), Objective.__call__, []

    def sometimes(self, sub, *rivals):
        calls.append(sub)
        figures = call(self, sub, *rivals)
        return replace(figures, accuracy=float("nan")) if len(calls) == 3 else figures

    monkeypatch.setattr(Objective, "__call__", sometimes)
    front = search(config(run))
    assert len(front.trials) == 8 and len(calls) == 9
    assert calls[2] not in [one.candidate for one in front.trials]
    monkeypatch.setattr(
        Objective, "__call__",
        lambda self, *given: replace(call(self, *given), accuracy=float("nan")),
    )  # fmt: skip
    with pytest.raises(RunError, match=r"4 sub-adapters in a row.*accuracy=nan"):
        search(config(run, trials=20))


def test_a_search_needs_training(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nothing", tmp_path / "empty"):
        with pytest.raises(RunError, match=f"elastic train --run {folder}"):
            search(SearchConfig(run=str(folder)))
        assert __main__.main(["search", str(folder)]) == 1
        assert "elastic train" in capsys.readouterr().err
