"""`elastic export`: what was recovered is what is written, beside the full model as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic.config import CompensationConfig, ExportConfig, HfConfig, RecoveryConfig
from elastic.config.parsing import parse
from elastic.errors import ConfigError
from elastic.files import read_json
from elastic.recovery.command import export
from elastic.run import Run
from elastic.supernet.store import load_run
from tests.helpers import exports, tiny
from tests.helpers.tiny_runs import copy_run

STEPS = RecoveryConfig(steps=3, base_lr=5e-3)


def asked(run, **overrides) -> ExportConfig:
    settings = dict(
        sub_adapter="minimal", recover=STEPS, accuracy=True, compensation=CompensationConfig()
    )
    return exports.config(run, **(settings | overrides))


def written(report) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(report.directory / "hf", dtype=torch.float32)
    return tiny.logits(model.eval(), tiny.tokens())


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """(run, report) of the minimal sub-adapter, recovered."""
    run = copy_run(trained, tmp_path_factory.mktemp("recovered") / "run")
    return run, export(asked(run))


def test_the_recovered_one_is_written(exported):
    run, report = exported
    recovery = report.recovery
    assert recovery["taken"] and report.directory.name == "minimal"
    _, _, mine = load_run(Run(run.recovered / recovery["folder"]))
    degree = recovery["after"]["compensation"]["degree"]
    with mine.active(mine.space.minimal(), degree) as model:
        exports.logits_close(written(report), tiny.logits(model, tiny.tokens()))
    assert (
        report.contents["recovery"]
        == recovery
        == read_json(report.directory / "report.json")["recovery"]
    )
    assert report.contents["accuracy"] == recovery["after"]["accuracy"]
    told = report.markdown()
    assert f"{recovery['before']['accuracy']:.1%} before" in told and "3 steps" in told


def test_the_full_model_beside_it_is_the_one_of_before(exported):
    _, report = exported
    before = report.recovery["maximal"]["before"]["accuracy"]
    assert report.formats["hf"].trade.full.accuracy == before


def test_written_without_proof_it_is_the_same(exported):
    run, report = exported
    file = run.recovered / report.recovery["folder"] / "minimal.json"
    plain = export(
        asked(run, sub_adapter=str(file), recover=RecoveryConfig(), prove=False, name="b")
    )
    exports.logits_close(written(plain), written(report))


def test_one_size_for_all_layers_is_of_the_super_adapter(exported):
    """Its factors were not trained on at that size."""
    run, report = exported
    file = run.recovered / report.recovery["folder"] / "minimal.json"
    nested = CompensationConfig(sequential=False)
    settings = dict(recover=RecoveryConfig(), hf=HfConfig(uniform=True), compensation=nested)
    found = export(asked(run, sub_adapter=str(file), name="uniform", **settings))
    assert found.recovery is None
    _, _, net = load_run(run)
    with net.active(found.model.sub, found.model.made_up.degree) as model:
        exports.logits_close(written(found), tiny.logits(model, tiny.tokens()))


def test_what_gets_worse_is_written_as_it_was(trained, tmp_path, rising_losses):
    run = copy_run(trained, tmp_path / "run")
    settings = dict(compensation=CompensationConfig(sequential=False), accuracy=False)
    plain = export(asked(run, recover=RecoveryConfig(), name="plain", **settings))
    report = export(asked(run, **settings))
    assert not report.recovery["taken"] and "not taken" in report.markdown()
    assert torch.equal(written(report), written(plain))
    assert report.model.made_up.degree == plain.model.made_up.degree


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--recover", "-1"], "at least 0"),
        (["--recover", "2", "--recover.distill", "2"], "distill"),
        (["--recover", "2", "--recover.base_lr", "0"], "positive"),
        (["--recover", "2", "--prove", "false", "--formats", "hf"], "prove"),
        (["--recover", "2", "--hf.uniform"], "uniform"),
    ],
)
def test_settings_that_make_no_sense_are_refused(flags, words):
    with pytest.raises(ConfigError, match=words):
        parse(ExportConfig, ["run", *flags])


def test_the_short_name_is_the_number_of_steps():
    for flags in (["--recover", "7"], ["--recover=7"], ["--recover.steps", "7"]):
        assert parse(ExportConfig, ["run", *flags]).recover == RecoveryConfig(steps=7)
