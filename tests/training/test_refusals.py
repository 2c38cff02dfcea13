"""What is refused before weights load, and what is not done twice."""

import dataclasses
import shutil

import pytest

from elastic.config import (
    AdapterConfig,
    ModelConfig,
    ProloraConfig,
    StageConfig,
    TaskConfig,
)
from elastic.errors import ConfigError, DataError, ModelError, RunError
from elastic.models import loading
from elastic.run import Run
from elastic.training import one_task
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.tiny_runs import (
    snapshot,
    space_file,
    train_config,
)


@pytest.fixture
def forbid_weights(monkeypatch):
    """Loading weights fails the test."""

    def load(*_, **__):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(loading, "load_model", load)


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    config = train_config(tiny_folder, tmp_path_factory.mktemp("finished") / "run")
    train_one(config)
    return config


def test_a_finished_run_is_not_trained_again(finished, forbid_weights):
    before = snapshot(Run(finished.run).path)
    assert train_one(finished).path == Run(finished.run).path
    assert snapshot(Run(finished.run).path) == before


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 1}, "seed"),
        ({"adapter": AdapterConfig(rank=8, alpha=1.0)}, "adapter.alpha"),
        ({"stages": [StageConfig()]}, "stages"),
    ],
)
def test_another_configuration_is_refused(finished, forbid_weights, change, named):
    before = snapshot(Run(finished.run).path)
    with pytest.raises(RunError, match=f"another run.*{named}"):
        train_one(dataclasses.replace(finished, **change))
    assert snapshot(Run(finished.run).path) == before


def test_a_moved_run_is_still_the_same(finished, forbid_weights, tmp_path):
    shutil.copytree(finished.run, tmp_path / "moved")
    train_one(dataclasses.replace(finished, run=str(tmp_path / "moved")))


def test_a_directory_of_other_things_is_refused(tiny_folder, tmp_path, forbid_weights):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        train_one(train_config(tiny_folder, tmp_path / "run"))
    assert list(snapshot(tmp_path / "run")) == ["letter.txt"]


def _strange_block(space: dict) -> None:
    space["blocks"] = "transformer.h.*"


def _rank_too_large(space: dict) -> None:
    space["groups"]["mlp_rank"]["choices"] = [9]


@pytest.mark.parametrize("spoil", [_strange_block, _rank_too_large])
def test_a_bad_space_is_refused_before_weights(tiny_folder, tmp_path, forbid_weights, spoil):
    declared = tiny.space_dict()
    spoil(declared)
    space = space_file(tmp_path / "spaces", declared)
    with pytest.raises(ConfigError, match=r"tiny-space\.yaml"):
        train_one(train_config(tiny_folder, tmp_path / "run", space=space))
    assert not (tmp_path / "run").exists()


def test_an_unknown_space_is_refused_before_weights(tiny_folder, tmp_path, forbid_weights):
    with pytest.raises(ConfigError, match=r"lama.*did you mean 'llama'"):
        train_one(train_config(tiny_folder, tmp_path / "run", space="lama"))


def test_an_order_that_changes_the_model_is_refused(tiny_folder, tmp_path, monkeypatch):
    """Moving the channels of gate and down, but not those of up: where shapes tell nothing, because
    the model needs values, numbers do."""
    monkeypatch.setattr(one_task, "require_fits", lambda *_: None)
    declared = tiny.space_dict()
    declared["groups"]["mlp_width"]["outputs"] = ["mlp.gate_proj"]
    space = space_file(tmp_path, declared)
    with pytest.raises(ConfigError, match="does not name all layers that share its channels"):
        train_one(train_config(tiny_folder, tmp_path / "run", space=space))


@pytest.mark.parametrize("content", [None, "", "\n\n", "{broken"])
def test_bad_data_is_refused_before_weights(tiny_folder, tmp_path, forbid_weights, content):
    file = tmp_path / "train.jsonl"
    if content is not None:
        file.write_text(content)
    task = TaskConfig(name="jsonl", train=str(file), test=str(file))
    with pytest.raises(DataError, match=r"train\.jsonl"):
        train_one(train_config(tiny_folder, tmp_path / "run", task=task))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nowhere"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_device_that_is_not_there_is_refused_before_weights(
    tiny_folder, tmp_path, forbid_weights, device, dtype
):
    model = ModelConfig(path=str(tiny_folder), dtype=dtype, device=device)
    with pytest.raises(ModelError, match=f"device '{device}'"):
        train_one(train_config(tiny_folder, tmp_path / "run", model=model))
    assert not (tmp_path / "run").exists()


def test_a_missing_model_is_refused_before_weights(tmp_path, forbid_weights):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(ModelError, match=folder.name):
            train_one(train_config(folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("adapter", "match"),
    [
        (AdapterConfig(method="sorsa", rank=17), "exceeds the 16 singular values"),
        (
            AdapterConfig(method="prolora", rank=8, prolora=ProloraConfig(unshared_rank=4)),
            "below the 4 unshared ranks",
        ),
        (AdapterConfig(method="soslora", rank=8), "would leave the experts uneven"),
    ],
)
def test_a_rank_the_method_cannot_have_is_refused_before_weights(
    tiny_folder, tmp_path, forbid_weights, adapter, match
):
    config = train_config(
        tiny_folder, tmp_path / "run", adapter=adapter, space=wide_space(tmp_path)
    )
    with pytest.raises(ConfigError, match=match):
        train_one(config)
    assert not (tmp_path / "run").exists()


def wide_space(folder) -> str:
    """Ranks as fractions, so that any max_rank binds."""
    declared = tiny.space_dict()
    for group in declared["groups"].values():
        if group["dim"] == "rank":
            group["choices"] = [1.0, 0.25]
    return space_file(folder, declared)
