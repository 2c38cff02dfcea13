"""Two processes compute what one does with twice the batch; sharded ones too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from elastic import models
from elastic.config import AdapterConfig
from elastic.errors import ConfigError
from elastic.files import read_json
from elastic.run import Run
from elastic.training.checks import refuse_sharded
from elastic.training.command import train
from tests.helpers import tiny
from tests.helpers.steps import step_gradients
from tests.helpers.tiny_runs import assert_same_factors, logged, train_config
from tests.programs.several import REGULARISED, RUNS, config_of, gradients, together, write_tasks

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"


def launched(model: Path, folder: Path, *names: str) -> None:
    script = Path(__file__).parents[1] / "programs" / "several.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), str(model), str(folder), *names],
        capture_output=True, text=True, check=False,
        # One accelerator would not do for two processes.
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def two(tiny_folder, tmp_path_factory):
    """Two processes for everything."""
    folder = tmp_path_factory.mktemp("two")
    write_tasks(folder)
    assert together(tiny_folder, folder, *RUNS) == [0, 0]
    return folder


@pytest.mark.slow  # each process imports everything anew
def test_torchrun_starts_such_processes(tiny_folder, tmp_path, two):
    launched(tiny_folder, tmp_path, "staged")
    assert_same_factors(Run(tmp_path / "staged"), Run(two / "staged"))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one_with_twice_the_batch(tiny_folder, tmp_path, two, name):
    write_tasks(tmp_path)
    one, run = train(config_of(tiny_folder, tmp_path, name, alone=True)), Run(two / name)
    if name == "sequence":
        assert read_json(two / name / "continual.json")["n"] == [16, 16]
        scores = (read_json(folder / name / "continual.json") for folder in (two, tmp_path))
        assert len({str(found["accuracy"]) for found in scores}) == 1
        one, run = (Run(folder / name / "tasks" / "02-words") for folder in (tmp_path, two))
    mine, theirs = logged(one), logged(run)
    assert [row["step"] for row in theirs] == [row["step"] for row in mine]
    for row, other in zip(mine, theirs, strict=True):
        assert other == pytest.approx(row, rel=1e-4), row["step"]  # float32, summed in halves
    factors, again = (load_file(r.super_adapter / "factors.safetensors") for r in (one, run))
    assert factors.keys() == again.keys()
    for name_, tensor in factors.items():
        torch.testing.assert_close(again[name_], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("place", ["", "-in-loss"])
@pytest.mark.parametrize("method", REGULARISED)
def test_a_regulariser_counts_once_whatever_the_number_of_devices(
    tiny_folder, tmp_path, two, method, place
):
    """Two processes with half of the batch each see the gradient of one with all of it, also where
    it stands in the loss, as for DeepSpeed."""
    _, whole = step_gradients(tiny_folder, tmp_path, method, batch_size=16, accumulation=1)
    off = 1e-7 if method == "soslora" else 1e-9  # its gates are float32 inside, as published
    for rank in range(2):
        found = load_file(two / f"{method}{place}-{rank}.safetensors")
        assert found.keys() == whole.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, whole[name], rtol=off, atol=off)


def test_own_draws_differ_from_shared_ones(two):
    names = ("own", "staged", "resumed")
    losses = {name: [row["loss"] for row in logged(Run(two / name))] for name in names}
    assert losses["own"] != losses["staged"] and losses["resumed"] == losses["staged"]


def test_sharded_layers_have_the_gradients_of_whole_ones(two):
    found = load_file(two / "sharded.safetensors")
    whole = gradients(tiny.supernet(heads=True), tiny.tokens(batch=4))
    assert found.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_fsdp_needs_an_accelerator(tiny_folder, tmp_path, monkeypatch):
    """accelerate would shard nothing on a CPU, without a word."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"FSDP.*ddp\.yaml"):
        train(train_config(tiny_folder, tmp_path / "run"))


@pytest.mark.parametrize(
    ("variable", "settings", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", {"sampling": "sandwich"}, "sampling: sandwich"),
        (
            "ACCELERATE_USE_DEEPSPEED",
            {"adapter": AdapterConfig(method="sorsa", rank=8)},
            "max_grad_norm 1: the regulariser of sorsa is not to be clipped",
        ),
        ("ACCELERATE_USE_FSDP", {"adapter": AdapterConfig(method="soslora", rank=8)}, "soslora"),
    ],
)
def test_what_sharding_cannot_do_is_refused_before_weights_load(
    tiny_folder, tmp_path, monkeypatch, variable, settings, message
):
    monkeypatch.setenv(variable, "true")
    monkeypatch.setattr(models.loading, "load", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=message):
        train(train_config(tiny_folder, tmp_path / "run", **settings))


@pytest.mark.parametrize(
    ("variable", "stage", "method", "settings"),
    [
        ("ZERO_STAGE", 1, "soslora", {}),
        ("ZERO_STAGE", 2, "soslora", {}),
        ("ZERO_STAGE", 2, "olora", {}),
        ("ZERO_STAGE", 2, "sorsa", {"max_grad_norm": 0.0}),
        ("CONFIG_FILE", 1, "soslora", {}),
        ("ZERO_STAGE", 3, "soslora", None),
        ("CONFIG_FILE", 3, "soslora", None),
    ],
)
def test_regularised_methods_train_where_every_process_has_the_factors_whole(
    tmp_path, monkeypatch, variable, stage, method, settings
):
    value = str(stage)
    if variable == "CONFIG_FILE":
        file = tmp_path / "zero.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        value = str(file)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{variable}", value)
    adapter = AdapterConfig(method=method, rank=8)
    config = train_config(tmp_path, tmp_path / "run", adapter=adapter, **(settings or {}))
    if settings is not None:
        refuse_sharded(config)
        return
    with pytest.raises(ConfigError, match=r"needs factors whole.*zero2\.yaml"):
        refuse_sharded(config)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_launch_configurations_are_accelerates(file):
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(file))
    assert found.num_processes == 2 and str(found.mixed_precision) == "no"
    kinds = {"ddp": "MULTI_GPU", "fsdp": "FSDP"}
    assert found.distributed_type == kinds.get(file.stem, "DEEPSPEED")
    if file.stem.startswith("zero"):
        assert found.deepspeed_config["zero_stage"] == int(file.stem[-1])
    assert f"configs/accelerate/{file.name}" in file.read_text()
