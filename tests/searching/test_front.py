"""What a search leaves: its front beside the full model, measured and scored, and its files.
Latency is a function of the parameter count here; accuracy is real."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import pytest

from elastic.config import BudgetConfig, CompensationConfig
from elastic.data import load_task
from elastic.evaluation.evaluate import evaluate
from elastic.evaluation.statistics import Score, difference
from elastic.files import BUILDING
from elastic.latency import bench, target
from elastic.latency.target import Target
from elastic.run import Run
from elastic.searching import finalists, study
from elastic.searching.page import write_page
from elastic.searching.study import search
from elastic.supernet.compact import compact
from elastic.supernet.cost import count
from elastic.supernet.held_out import Compensated, HeldOut
from elastic.supernet.store import load_run
from tests.helpers.searches import (
    config,
    front_of,
    trials_of,
)
from tests.helpers.tiny_runs import copy_run, decode_of, fake_measure, prefill_of

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


def test_a_searched_run_can_be_moved(searched, tmp_path):
    run, front = searched
    shutil.copytree(run.path, tmp_path / "moved")
    moved = Run(tmp_path / "moved")
    space = load_run(moved)[2].space
    assert moved.resolve("best", space) == ("best", front.best.sub_adapter)
    name = front.members[0].name
    assert moved.resolve(name, space) == (name, front.members[0].sub_adapter)
