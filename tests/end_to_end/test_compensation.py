"""What a sub-adapter makes up for is one thing in training, search, evaluation and export."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from elastic.config import CompensationConfig, EvaluateConfig, StageConfig
from elastic.evaluation.command import evaluate_run
from elastic.exporting.command import export
from elastic.files import read_json
from elastic.formats import hf
from elastic.searching.study import search
from elastic.supernet.compact import compact
from elastic.supernet.store import MOMENTS, load_run
from elastic.training.one_task import train_one
from tests.helpers import exports, searches, tiny
from tests.helpers.tiny_runs import copy_run, factors

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
    report = export(exports.config(run, sub_adapter=cut[0], formats=["hf", "onnx"]))
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
    report = export(exports.config(run, sub_adapter="minimal"))
    saved = read_json(report.directory / "report.json")["compensation"]
    assert set(saved["held_out_losses"]) == {"0", "0.5", "1"}
    assert saved["held_out_losses"][f"{saved['degree']:g}"] == min(
        saved["held_out_losses"].values()
    )


def test_streamed_with_one_degree_it_is_the_same_model(run):
    asked = dict(sub_adapter="minimal", compensation=ALL)
    proved = export(exports.config(run, **asked, name="proved"))
    only = export(exports.config(run, **asked, name="only", prove=False))
    files = [report.directory / "hf" / "model.safetensors" for report in (proved, only)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert read_json(only.directory / "report.json")["compensation"]["degree"] == 1


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
    report = export(exports.config(trained))
    assert read_json(report.directory / "report.json")["compensation"] == about["compensation"]


def test_without_calibration_nothing_is_made_up_for(trained, tmp_path):
    config = replace(trained.config(), run=str(tmp_path / "plain"), compensation_examples=0)
    plain = train_one(config)
    assert not (plain.super_adapter / MOMENTS).exists()
    report = export(exports.config(plain, sub_adapter="minimal", compensation=ALL))
    saved = read_json(report.directory / "report.json")["compensation"]
    assert saved == {"degree": 0.0, "held_out_losses": {}}
