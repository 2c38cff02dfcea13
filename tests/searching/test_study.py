"""A search is repeatable, resumable and honest about its budget. Latency is a function of the
parameter count here; accuracy is real."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from optuna.samplers import NSGAIIISampler, NSGAIISampler

from elastic import __main__
from elastic.config import BudgetConfig, CompensationConfig, SearchConfig, StudyConfig
from elastic.data import load_task
from elastic.errors import ConfigError, MissingExtra, RunError
from elastic.evaluation.evaluate import evaluate
from elastic.evaluation.statistics import Score, difference
from elastic.files import BUILDING
from elastic.latency import bench, target
from elastic.latency.target import Target
from elastic.run import Run
from elastic.searching import finalists, objective, screening, study
from elastic.searching.objective import Objective
from elastic.searching.page import write_page
from elastic.searching.study import search
from elastic.spaces.bound import Candidate
from elastic.supernet.compact import compact
from elastic.supernet.cost import count
from elastic.supernet.held_out import Compensated, HeldOut
from elastic.supernet.store import load_run
from tests.helpers.searches import (
    choices_task,
    config,
    front_of,
    measured,
    sub_of,
    trained_run,
    trials_of,
)
from tests.helpers.tiny import ATTENTION, GATE_UP
from tests.helpers.tiny_runs import copy_run, decode_of, fake_measure, prefill_of, randomize_factors

pytestmark = pytest.mark.usefixtures("fake_latency")


def test_files_of_a_search(searched):
    run, front = searched
    names = ("trials.csv", "front.json", "front.png", "report.html", "study.journal", "about.json")
    for name in names:
        assert (run.search / name).stat().st_size > 0, name
    assert (run.search / "front.png").read_bytes().startswith(b"\x89PNG")
    names = [member.name for member in front.members]
    assert {f.stem for f in run.sub_adapters.iterdir()} == {*names, "best"}
    rows = front_of(run)
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert row == json.loads((run.sub_adapters / f"{row['name']}.json").read_text())
        assert row["accuracy_n"] == 22 and row["validation_n"] == 30
        assert all(row[key] > 0 for key in ("prefill_ms", "decode_ms", "params", "macs"))
    [best] = [row for row in rows if row["best"]]
    assert best == json.loads((run.sub_adapters / "best.json").read_text())
    assert best["validation_estimate"] == max(row["validation_estimate"] for row in rows)
    rows = trials_of(run)
    assert len(rows) == 16 == len({row["sub_adapter"] for row in rows})


@pytest.mark.parametrize("latency", ["prefill_ms", "decode_ms"])
def test_members_meet_the_budget_and_dominate_the_rest(trained, searched, tmp_path, latency):
    run, front = searched
    if latency == "decode_ms":
        run = copy_run(trained, tmp_path / "run")
        budget = BudgetConfig(decode_ms="90%", min_accuracy=0.1)
        objectives = ["accuracy", latency]
        front = search(config(run, trials=12, budget=budget, objectives=objectives))
    rows = trials_of(run)
    full = getattr(front.full, latency)
    limit = {"prefill_ms": 0.85, "decode_ms": 0.9}[latency] * full
    assert front.limits[latency] == pytest.approx(limit)

    def meets(values):
        return float(values[latency]) <= limit and float(values["accuracy_estimate"]) >= 0.1

    assert [row["feasible"] == "True" for row in rows] == [meets(row) for row in rows]
    assert {row["feasible"] for row in rows} == {"True", "False"}
    members = [(row["validation_estimate"], row[latency]) for row in front_of(run)]
    assert members == sorted(members) and len(set(members)) == len(members)  # both rise together
    feasible = [
        (float(row["accuracy_estimate"]), float(row[latency]))
        for row in rows
        if row["feasible"] == "True"
    ]
    assert set(members) <= set(feasible)
    for accuracy, ms in feasible:
        assert any(a >= accuracy and m <= ms for a, m in members)


def test_members_stand_beside_the_full_model_on_the_same_test_examples(searched, capsys):
    run, front = searched
    trained, base, net = load_run(run)
    task = load_task(trained.task, trained.seed)
    with net.active(net.space.maximal()) as model:
        full = evaluate(model, base.tokenizer, task.test)
    for row in front_of(run):
        assert row["full_accuracy"] == full.accuracy and row["full_correct"] == full.marks
        mine = Score.of_marks(row["correct"])
        assert (mine.accuracy, mine.n) == (row["accuracy"], row["accuracy_n"])
        gap, interval = difference(mine, full)
        assert (row["difference"], row["difference_interval"]) == (gap, list(interval))
    front.show()
    shown = capsys.readouterr().out
    assert f"the full model has {full.accuracy:.1%} right" in " ".join(shown.split())
    assert f"{100 * front.best.beside_full[0]:+.1f} [" in shown


def test_what_is_known_of_finalists_is_not_asked_again(searched, tmp_path, monkeypatch):
    """Nor lost where the target is another machine; what the first could not measure in peace is
    measured again."""
    first, front = searched
    run = copy_run(first, tmp_path / "run")
    budget = BudgetConfig(prefill_ms="85%", min_accuracy=0.1)
    settings = config(run, trials=16, starts=6, budget=budget)

    def forbidden(*_, **__):
        pytest.fail("scored or timed again")

    with monkeypatch.context() as patch:
        patch.setattr(finalists, "evaluate", forbidden)
        patch.setattr(bench, "measure", forbidden)
        again = search(settings)
        elsewhere = replace(Target.of(run, settings.timing), device="another")
        patch.setattr(target.Target, "of", lambda *_: elsewhere)
        patch.setattr(study, "_subject", lambda _: {})
        there = search(settings)
    assert again.members == front.members == there.members
    assert all(member.measured for member in front.members)

    timed = []
    kept = finalists._times

    def busy(study_, chosen, objective, *, measure):
        times = dict(study_.user_attrs[finalists.TIMES])
        times[str(chosen[0].sub_adapter)]["trusted"] = False
        study_.set_user_attr(finalists.TIMES, times)
        return kept(study_, chosen, objective, measure=measure)

    monkeypatch.setattr(finalists, "_times", busy)
    monkeypatch.setattr(
        bench, "measure", lambda runners, *a, **k: timed.append(1) or fake_measure(runners, *a, **k)
    )
    assert search(settings).members[0].measured.trusted and len(timed) == 1


def test_killed_finalists_keep_the_scores_they_have(trained, tmp_path, monkeypatch):
    run = copy_run(trained, tmp_path / "run")
    settings = config(run, trials=4, screen=0, test_front=3)
    asked, ask = [], finalists.evaluate

    def killed(*given, **settings):
        asked.append(None)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(*given, **settings)

    monkeypatch.setattr(finalists, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        search(settings)
    front = search(settings)
    everyone = {one.candidate for one in front.members} | {front.trials[0].candidate}
    assert len(asked) == len(everyone) + 1


def test_figures_are_those_of_the_sub_adapter(trained, tmp_path):
    """Of what it makes up for, too."""
    run = copy_run(trained, tmp_path / "run")
    front = search(config(run, trials=10, starts=6, compensation=CompensationConfig()))
    trained, base, net = load_run(run)
    task = load_task(trained.task, trained.seed)
    assert len({one.figures.accuracy for one in front.trials}) > 2  # or this shows nothing
    for one in front.trials:
        sub, figures = one.sub_adapter, one.figures
        cost = count(compact(net, sub))
        assert (figures.params, figures.macs) == (cost.params, cost.macs)
        assert figures.prefill_ms == pytest.approx(prefill_of(cost.params), rel=0.01)
        assert figures.decode_ms == pytest.approx(decode_of(cost.params), rel=0.01)
        with net.active(sub, figures.degree) as model:
            score = evaluate(model, base.tokenizer, task.validation)
        assert (figures.accuracy, figures.accuracy_n) == (score.accuracy, score.n)
    held_out = HeldOut.of(run, net, base.tokenizer, task, CompensationConfig())
    for member in front.members:
        made_up = Compensated.of(member.test["compensation"])
        model = held_out.model(member.sub_adapter, made_up)
        assert member.test["accuracy"] == evaluate(model, base.tokenizer, task.test).accuracy
    assert any(one.figures.held_out_losses for one in front.trials)


def test_the_extremes_come_first(searched):
    run, front = searched
    space = load_run(run)[2].space
    first = [one.sub_adapter for one in front.trials[:2]]
    assert first == [space.maximal(), space.minimal()]
    assert front.full == front.trials[0].figures


def test_the_front_prints_a_machine_readable_last_line(searched, capsys):
    run, front = searched
    front.show()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["name"] == front.best.name
    assert last["file"] == str(run.sub_adapters / "best.json")


def test_a_thinned_front_keeps_its_ends(trained, tmp_path):
    run = copy_run(trained, tmp_path / "run")
    whole = search(config(run, screen=0, trials=16))
    few = search(config(run, screen=0, trials=16, test_front=2))
    assert len(whole.members) > 2
    ends = [whole.members[0].sub_adapter, whole.members[-1].sub_adapter]
    assert [member.sub_adapter for member in few.members] == ends
    assert few.best.sub_adapter == whole.best.sub_adapter
    [one] = search(config(run, screen=0, trials=16, test_front=1)).members
    assert one.sub_adapter == whole.best.sub_adapter and one.best


# Samplers.


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


# Resuming.


def test_more_trials_continue_a_study(trained, tmp_path, asked):
    whole = copy_run(trained, tmp_path / "whole")
    search(config(whole, starts=8))
    asked.clear()
    run = copy_run(trained, tmp_path / "run")
    search(config(run, trials=4, starts=8))
    first = measured(run)
    assert len(asked) == 4 == len(first)
    search(config(run, trials=8, starts=8))
    assert len(asked) == 8 == len(set(asked))
    assert measured(run)[:4] == first
    # All eight were settled at the start: stopping in between makes no difference.
    assert trials_of(run) == trials_of(whole)
    assert front_of(run) == front_of(whole)
    asked.clear()
    search(config(run, trials=8, starts=8))
    assert asked == []
    assert front_of(run) == front_of(whole)


def test_a_resumed_sampler_brings_new_sub_adapters(trained, tmp_path, asked):
    run = copy_run(trained, tmp_path / "run")
    for trials in (6, 12):
        wanted = config(run, trials=trials, sampler="random", starts=2)
        search(wanted)
        assert len(asked) == trials == len(set(asked))
        assert len(study._open_study(run, wanted)[0].trials) == trials  # nothing was proposed twice


@pytest.mark.parametrize("starts, killed_at", [(8, 2), (12, 3), (2, 6)])
def test_a_killed_search_loses_nothing(trained, tmp_path, monkeypatch, starts, killed_at):
    """Killed while a sub-adapter is measured: that one is measured first when the search goes
    on. With more starts than trials there is a queue it could be lost behind."""
    run = copy_run(trained, tmp_path / "run")
    seen, call = [], Objective.__call__

    def killed(self, sub, *rivals):
        seen.append(sub)
        if len(seen) == killed_at:
            raise KeyboardInterrupt
        return call(self, sub, *rivals)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            search(config(run, starts=starts))
        search(config(run, starts=starts))
    assert seen[killed_at] == seen[killed_at - 1]
    assert len(seen) == 8 + 1 and len(set(seen)) == 8
    assert [Candidate(sub_of(row)) for row in trials_of(run)] == list(dict.fromkeys(seen))
    if starts == 8:  # nothing was left to the sampler
        whole = copy_run(trained, tmp_path / "whole")
        search(config(whole, starts=starts))
        assert trials_of(run) == trials_of(whole)
        assert front_of(run) == front_of(whole)


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


@pytest.mark.parametrize("package", ["matplotlib", "plotly"])
def test_without_the_libraries_that_draw_nothing_is_drawn_and_nothing_old_stays(
    searched, tmp_path, monkeypatch, capsys, package
):
    run, front = searched
    front = replace(front, run=copy_run(run, tmp_path / "run"))
    monkeypatch.setitem(sys.modules, package, None)
    front.save()
    write_page(front)
    left = {path.name for path in front.run.search.iterdir()}
    drawn = {"front.png", "report.html"}
    assert left == {path.name for path in run.search.iterdir()} - drawn
    assert front_of(front.run) == front_of(run)
    front.show()
    said = " ".join(capsys.readouterr().out.split())
    assert f"No plot was drawn: drawing needs {package}" in said
    assert "pip install 'elastic-adapters[plots]', then run this again" in said
    assert "Plot:" not in said


def test_what_kills_left_in_a_search_goes_with_the_next_one(searched, tmp_path):
    run, front = searched
    run = copy_run(run, tmp_path / "run")
    before = {path.name for path in run.search.iterdir()}
    for name in ("front.json", "report.html", "about.json", "sub_adapters"):
        (run.search / f".{name}.abcd{BUILDING}").mkdir()
    replace(front, run=run).save()
    assert {path.name for path in run.search.iterdir()} == before


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


def test_a_search_with_other_settings_is_refused(trained, tmp_path, forbid_weights):
    run = copy_run(trained, tmp_path / "run")
    study._open_study(run, config(run))[0].enqueue_trial({})
    for change, named in (
        ({"seed": 1}, "seed"),
        ({"sampler": "tpe"}, "sampler"),
        ({"objectives": ["accuracy", "decode_ms"]}, "objectives"),
    ):
        with pytest.raises(RunError, match=rf"other settings: {named} .*or delete"):
            search(config(run, **change))
    again, _ = study._open_study(run, config(run, trials=99))  # more trials are no other search
    assert len(again.trials) == 1


def test_a_study_of_another_super_adapter_or_task_is_refused(trained, tmp_path, forbid_weights):
    run = copy_run(trained, tmp_path / "run")
    study._open_study(run, config(run))
    other = copy_run(run, tmp_path / "other" / "run")
    randomize_factors(other, seed=1)
    with pytest.raises(RunError, match="other super-adapter: factors"):
        search(config(other))
    text = other.config_file.read_text()
    moved = copy_run(run, tmp_path / "moved" / "run")
    moved.config_file.write_text(text.replace("validation_examples: ", "validation_examples: 1"))
    with pytest.raises(RunError, match=r"other task: task\.validation_examples"):
        search(config(moved))


def test_a_study_is_of_one_set_of_rows_wherever_they_are(trained, tmp_path, forbid_weights):
    """Also of a run that does not know what it was trained on."""
    run = copy_run(trained, tmp_path / "run")
    (tmp_path / "data").mkdir()
    task = choices_task(tmp_path / "data")
    run.move(replace(run.config(), task=task))
    study._open_study(run, config(run))[0].enqueue_trial({})
    (tmp_path / "elsewhere").mkdir()
    run.move(replace(run.config(), task=choices_task(tmp_path / "elsewhere")))
    again, _ = study._open_study(run, config(run))
    assert len(again.trials) == 1, "the same rows in another place"
    file = tmp_path / "elsewhere" / "validation.jsonl"
    file.write_text(file.read_text().replace("Tom", "Bob"))
    with pytest.raises(RunError, match=r"other data: the validation examples of .*\(30 others\)"):
        search(config(run))
    run.data.unlink()
    with pytest.raises(RunError, match="other rows: validation"):
        search(config(run))


def test_a_study_of_an_earlier_version_goes_on(trained, tmp_path):
    run = copy_run(trained, tmp_path / "run")
    settings = yaml.safe_load(run.config_file.read_text())
    settings["task"]["draw"] = "position"
    run.data.unlink()
    run.config_file.write_text(yaml.safe_dump(settings))
    opened, _ = study._open_study(run, config(run))
    kept = opened.user_attrs["task"]
    for name in ("draw", "cutoff"):
        del kept["task"][name]
    opened.set_user_attr("task", kept)
    study._open_study(run, config(run))


@pytest.mark.parametrize("right", [False, True])
def test_what_is_believed_of_an_accuracy_is_a_share(trained, tmp_path, monkeypatch, right):
    def evaluated(model, tokenizer, examples, **_):
        return Score((right,) * len(examples))

    monkeypatch.setattr(objective, "evaluate", evaluated)
    front = search(config(copy_run(trained, tmp_path / "run"), trials=8, starts=6))
    assert all(0 <= one.estimate <= 1 for one in front.trials)


def test_an_interrupted_search_leaves_a_front(trained, tmp_path, monkeypatch):
    run, call, calls = copy_run(trained, tmp_path / "run"), Objective.__call__, []

    def interrupted(self, sub, *rivals):
        calls.append(sub)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return call(self, sub, *rivals)

    monkeypatch.setattr(Objective, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(config(run, starts=6))
    assert len(trials_of(run)) == 5 and front_of(run)
    assert run.chosen("best").candidate in calls


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


def test_a_searched_run_can_be_moved(searched, tmp_path):
    run, front = searched
    shutil.copytree(run.path, tmp_path / "moved")
    moved = Run(tmp_path / "moved")
    space = load_run(moved)[2].space
    assert moved.resolve("best", space) == ("best", front.best.sub_adapter)
    name = front.members[0].name
    assert moved.resolve(name, space) == (name, front.members[0].sub_adapter)


def test_every_choice_is_tried_alone_once_for_a_study(trained, tmp_path, monkeypatch):
    asked = []
    ask = Objective.divergence

    def spied(self, candidate, rows):
        asked.append(rows)
        return ask(self, candidate, rows)

    monkeypatch.setattr(Objective, "divergence", spied)
    run = copy_run(trained, tmp_path / "run")
    search(config(run, trials=4, screen=7))
    asked_once = screening.count(load_run(run)[2].space)
    assert asked == [7] * asked_once
    search(config(run, trials=12, screen=7))
    assert len(asked) == asked_once
    told = json.loads((run.search / "about.json").read_text())["foresight"]
    assert told["n"] == 12 - 6 and told["r2"] <= 1


@pytest.mark.parametrize("killed_at", [1, 4])
def test_a_killed_screening_goes_on(trained, tmp_path, monkeypatch, capsys, killed_at):
    whole, run = (copy_run(trained, tmp_path / name / "run") for name in ("whole", "killed"))
    settings = dict(trials=5, screen=8)
    search(config(whole, **settings))
    asked, ask = [], Objective.divergence

    def killed(self, candidate, rows):
        asked.append(candidate)
        if len(asked) == killed_at:
            raise KeyboardInterrupt
        return ask(self, candidate, rows)

    monkeypatch.setattr(Objective, "divergence", killed)
    with pytest.raises(KeyboardInterrupt):
        search(config(run, **settings))
    assert len(asked) == killed_at
    search(config(run, **settings))
    assert asked[killed_at] == asked[killed_at - 1]  # the one that was not answered
    assert len(asked) == len(set(asked)) + 1 == screening.count(load_run(run)[2].space) + 1
    said = f"choices alone, of which {killed_at - 1} were tried before"
    assert (said in " ".join(capsys.readouterr().err.split())) == (killed_at > 1)
    assert trials_of(run) == trials_of(whole) and front_of(run) == front_of(whole)


def test_divergences_of_another_study_are_not_believed(trained, tmp_path, monkeypatch):
    """Its settings, of which they are, may be others."""
    asked, ask = [], Objective.divergence

    def spied(self, candidate, rows):
        asked.append(rows)
        return ask(self, candidate, rows)

    monkeypatch.setattr(Objective, "divergence", spied)
    run = copy_run(trained, tmp_path / "run")
    for name, screen in (("one", 8), ("two", 8), ("three", 7)):
        search(config(run, trials=2, screen=screen, study=StudyConfig(name=name)))
    assert [asked.count(rows) for rows in (8, 7)] == [2 * len(asked) / 3, len(asked) / 3]


def test_without_screening_gradients_are_asked(trained, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Objective, "divergence", lambda *given: asked.append(given))
    run = copy_run(trained, tmp_path / "run")
    search(config(run, trials=4, screen=0))
    assert not asked
    told = (run.search / "study.journal").read_text()
    assert '"importance"' in told and '"screened"' not in told
