"""What a sub-adapter makes up for is one thing in training, search, evaluation and export."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from elastic.config import (
    CompensationConfig,
    EvaluateConfig,
    MergeAdapterConfig,
    MergeConfig,
    StageConfig,
)
from elastic.data.answers import answer_logits, answer_loss
from elastic.evaluation.command import evaluate_run
from elastic.exporting.command import export
from elastic.files import read_json
from elastic.formats import hf
from elastic.searching.study import search
from elastic.supernet.compact import compact
from elastic.supernet.store import MOMENTS, load_run
from elastic.training.one_task import train_one
from tests.helpers import exports, searches, tiny
from tests.helpers.laws import batch_of
from tests.helpers.tiny_runs import (
    assert_same_factors,
    copy_run,
    factors,
    interrupted,
    train_config,
)

ALL = CompensationConfig(degrees=[1.0], sequential=False)


@pytest.fixture(scope="module")
def run(trained, fake_latency, tmp_path_factory):
    """Searched with one degree for all, so that everything but the maximal one is compensated."""
    run = copy_run(trained, tmp_path_factory.mktemp("compensated") / "run")
    search(searches.config(run, compensation=ALL))
    return run


def logits(model) -> torch.Tensor:
    return tiny.logits(model, tiny.tokens())


def test_the_front_says_it_and_the_export_has_it(run):
    members = {member["name"]: member for member in searches.front_of(run)}
    _, _, net = load_run(run)
    cut = [
        name for name in members if net.cuts(run.chosen(name).at(net.space))
    ]  # fmt: skip
    assert cut and all(members[name]["compensation"]["degree"] == 1 for name in cut)
    report = export(
        exports.config(
            run, sub_adapter=cut[0], formats=["hf", "onnx"], compensation=CompensationConfig()
        )
    )
    saved = read_json(report.directory / "report.json")
    assert saved["compensation"] == members[cut[0]]["compensation"]
    assert "100% of what is cut is made up for" in report.markdown()
    proved = report.formats["onnx"].exact
    assert proved.max_abs_diff < 1e-4 * proved.largest_logit
    sub = run.chosen(cut[0]).at(net.space)
    whole, none = compact(net, sub, 1.0), compact(net, sub)
    written = hf.load(report.directory / "hf", torch.float32, trust_remote_code=True)
    exports.logits_close(logits(written), logits(whole))
    assert not torch.allclose(logits(whole), logits(none), atol=1e-3)


def test_what_was_not_searched_is_decided_where_it_is_written(run):
    asked = dict(sub_adapter="minimal", compensation=CompensationConfig())
    report = export(exports.config(run, **asked))
    saved = read_json(report.directory / "report.json")["compensation"]
    losses = dict(saved["held_out_losses"])
    assert set(losses) == {"0", "0.5", "1", "sequential"}
    fitted = losses.pop("sequential")
    least = losses[f"{saved['degree']:g}"]
    assert least == min(losses.values())
    assert saved["sequential"] == (fitted < least)


def test_streamed_with_one_degree_it_is_the_same_model(run):
    asked = dict(sub_adapter="minimal", compensation=ALL)
    proved = export(exports.config(run, **asked, name="proved"))
    only = export(exports.config(run, **asked, name="only", prove=False))
    files = [report.directory / "hf" / "model.safetensors" for report in (proved, only)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert read_json(only.directory / "report.json")["compensation"]["degree"] == 1


def test_streamed_it_is_fitted_all_the_same(run, tmp_path):
    _, _, net = load_run(run)
    about = {"degree": 1.0, "sequential": True, "held_out_losses": {}}
    file = tmp_path / "fitted.json"
    minimal = net.space.minimal().as_dict()
    file.write_text(json.dumps({"sub_adapter": minimal, "compensation": about}))
    asked = dict(sub_adapter=str(file), compensation=CompensationConfig())
    proved = export(exports.config(run, **asked, name="proved"))
    only = export(exports.config(run, **asked, name="only", prove=False))
    saved = [
        read_json(report.directory / "report.json")["compensation"] for report in (proved, only)
    ]
    assert saved == [about, about]
    files = [report.directory / "hf" / "model.safetensors" for report in (proved, only)]
    expected, found = (load_file(file) for file in files)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    assert not list(only.directory.glob("tmp*"))


def test_with_others_merged_a_fit_is_left_out_and_that_is_said(run, tmp_path, capsys):
    _, _, net = load_run(run)
    about = {"degree": 1.0, "sequential": True, "held_out_losses": {}}
    file = tmp_path / "fitted.json"
    file.write_text(
        json.dumps({"sub_adapter": net.space.minimal().as_dict(), "compensation": about})
    )
    merge = MergeConfig(adapters=[MergeAdapterConfig(path=str(run.path), weight=0.5)])
    report = export(
        exports.config(run, sub_adapter=str(file), compensation=CompensationConfig(), merge=merge)
    )
    assert not report.model.made_up.sequential
    assert "was fitted to the full model" in capsys.readouterr().err


def test_an_evaluation_is_of_what_was_chosen(run, capsys):
    best = read_json(run.sub_adapters / "best.json")
    found = evaluate_run(EvaluateConfig(run=str(run.path), sub_adapter="best"))
    assert found.made_up.as_dict() == best["compensation"]
    assert found.score.accuracy == best["accuracy"]
    found.show()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["compensation"]


def test_one_that_is_trained_on_keeps_it(run, tmp_path):
    config = run.config()
    more = replace(
        config, run=str(tmp_path / "more"), start_from=str(run.path), sub_adapter="minimal",
        stages=[StageConfig()], distill=0.5,
    )  # fmt: skip
    trained = train_one(more)
    about = read_json(trained.sub_adapter)
    assert set(about["compensation"]["held_out_losses"]) == {"0", "0.5", "1"}
    moments = [each.super_adapter / MOMENTS for each in (run, trained)]
    assert moments[0].read_bytes() == moments[1].read_bytes()
    assert any(not torch.equal(x, factors(run)[name]) for name, x in factors(trained).items())
    report = export(exports.config(trained, compensation=CompensationConfig()))
    assert read_json(report.directory / "report.json")["compensation"] == about["compensation"]


def test_without_calibration_nothing_is_made_up_for(trained, tmp_path):
    config = replace(trained.config(), run=str(tmp_path / "plain"), compensation_examples=0)
    plain = train_one(config)
    assert not (plain.super_adapter / MOMENTS).exists()
    report = export(exports.config(plain, sub_adapter="minimal", compensation=ALL))
    saved = read_json(report.directory / "report.json")["compensation"]
    assert saved == {"degree": 0.0, "sequential": False, "held_out_losses": {}}


@pytest.fixture(scope="module")
def along(tiny_folder, tmp_path_factory):
    """Settings of a run that is trained with half of what it cuts made up for."""
    folder = tmp_path_factory.mktemp("along")
    config = train_config(tiny_folder, folder / "run", task=searches.choices_task(folder))
    return replace(config, compensation_in_training=0.5)


def test_in_training_cut_channels_are_trained_through_those_that_make_up_for_them(along):
    run = train_one(along)
    plain = train_one(replace(along, run=f"{along.run}-plain", compensation_in_training=0.0))
    assert not run.moments.exists()
    assert any(not torch.equal(x, factors(plain)[name]) for name, x in factors(run).items())
    _, _, net = load_run(run)
    site = next(site for site in net.space.reading if net.layer(site).adapter is not None)
    minimal = net.space.minimal()
    gone = torch.ones(net.layer(site).base.in_features, dtype=torch.bool)
    for start, length in net.space.left(minimal, site, "in"):
        gone[start : start + length] = False
    for degree in (0.0, 0.5):
        with net.active(minimal, degree) as model:
            answer_loss(*answer_logits(model, batch_of("a b c", "d e f"))).backward()
        gradient = net.layer(site).adapter.A.grad
        assert bool(gradient[:, gone].abs().sum() > 0) == (degree > 0)


def test_a_killed_run_that_makes_up_for_cuts_ends_like_one_that_was_not(along, monkeypatch):
    whole = train_one(replace(along, run=f"{along.run}-whole"))
    stopped = interrupted(replace(along, run=f"{along.run}-stopped"), monkeypatch, step=5)
    assert stopped.moments.exists()
    resumed = train_one(replace(along, run=f"{along.run}-stopped"))
    assert_same_factors(whole, resumed)
    files = [run.super_adapter / MOMENTS for run in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("every_trial", [False, True])
def test_every_trial_is_fitted_where_that_is_wanted(trained, fake_latency, tmp_path, every_trial):
    """Then the search evaluates what the front is scored as, and an export fits the same again."""
    run = copy_run(trained, tmp_path / "run")
    wanted = CompensationConfig(degrees=[1.0], every_trial=every_trial)
    front = search(searches.config(run, compensation=wanted))
    fitted = {one.candidate: one.figures.sequential for one in front.trials}
    assert any(fitted.values()) == every_trial
    for member in front.members:
        assert member.made_up.sequential >= fitted[member.candidate]
        if every_trial:
            assert member.made_up == member.figures.made_up
    member = next(one for one in front.members if one.made_up.sequential)
    report = export(exports.config(run, sub_adapter=member.name, compensation=wanted))
    assert report.model.made_up == member.made_up
