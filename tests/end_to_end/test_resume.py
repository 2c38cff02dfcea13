"""A run that was killed ends up bit for bit like one that was not."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from elastic.config import AdapterConfig, StageConfig, TaskConfig
from elastic.errors import RunError
from elastic.run import Run
from elastic.training import checkpoints
from elastic.training.one_task import train_one
from elastic.training.trainer import ElasticTrainer
from tests.helpers.children import ended, forked
from tests.helpers.tiny_runs import assert_same_factors, interrupted, logged, train_config

OPEN = StageConfig(train_dims=["rank", "width", "heads"], epochs=2)


def assert_same(run: Run, whole: Run) -> None:
    assert_same_factors(run, whole)
    assert logged(run) == logged(whole)
    assert not run.checkpoints.exists()


RESUMABLE = {
    "plain": {},
    "dropout": {"adapter": AdapterConfig(rank=8, dropout=0.2)},
    "sandwich": {"sampling": "sandwich", "distill": 0.5},
    "micro-batches": {
        "sample_each": "micro_batch",
        "accumulation": 2,
        "stages": [OPEN],
        "save_steps": 1,
        "task": TaskConfig(train_examples=24, validation_examples=8, test_examples=8),
    },
}


@pytest.mark.parametrize("kind", RESUMABLE)
def test_a_stopped_run_ends_like_one_that_was_not(tiny_folder, tmp_path, monkeypatch, kind):
    settings = RESUMABLE[kind]
    whole = train_one(train_config(tiny_folder, tmp_path / "whole", **settings))
    config = train_config(tiny_folder, tmp_path / "stopped", **settings)
    run = interrupted(config, monkeypatch, 3)
    assert not run.super_adapter.exists()
    assert 0 < len(logged(run)) < len(logged(whole))
    assert checkpoints.newest(run.checkpoints) is not None
    resumed = []
    trained = ElasticTrainer.train
    monkeypatch.setattr(
        ElasticTrainer, "train",
        lambda self, **kwargs: (resumed.append(kwargs), trained(self, **kwargs)),
    )  # fmt: skip
    train_one(config)
    assert resumed[0]["resume_from_checkpoint"] is not None
    assert_same(run, whole)


@pytest.mark.slow  # as tests/programs/stress.py does, to search and export as well
def test_kill_nine_at_any_moment(tiny_folder, tmp_path):
    """Also while a checkpoint is being written: every second kill waits for that."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "programs" / "killed.py"),
         str(tiny_folder), str(tmp_path), "0", "5"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["codes"] == [0, 0]
    assert any(kill["half"] for kill in found["kills"])
    assert sum("ended" not in kill for kill in found["kills"]) >= 4
    assert_same(Run(tmp_path / "killed"), Run(tmp_path / "whole"))


def test_a_kill_before_checkpoints_are_removed_is_made_up_for(tiny_folder, tmp_path, monkeypatch):
    config = train_config(tiny_folder, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "clear", lambda self: None)  # as far as the killed one came
        run = train_one(config)
    assert run.checkpoints.is_dir()
    train_one(config)
    assert [path.name for path in run.metrics.parent.iterdir()] == [run.metrics.name]


def test_the_same_command_twice_at_once_trains_once(tiny_folder, tmp_path, monkeypatch, capfd):
    config = train_config(tiny_folder, tmp_path / "run")
    children = [forked(lambda: train_one(config)) for _ in range(2)]
    codes = [ended(child) for child in children]
    said = " ".join(capfd.readouterr().err.split())
    assert codes == [0, 0], said
    assert said.count("Training ") == 1 and said.count("already trained") == 1
    run = Run(config.run)
    assert [row["step"] for row in logged(run)] == list(range(1, 9))
    assert list(run.path.glob("**/.*")) == []


# Damage.


def flip_a_byte(folder: Path) -> None:
    file = folder / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_and_mark(folder: Path, name: str = "optimizer.pt") -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    checkpoints.mark(folder)


DAMAGE = {
    "a flipped byte": flip_a_byte,
    "a lost file": lambda folder: (folder / "factors.safetensors").unlink(),
    "a cut file": lambda folder: (folder / "scheduler.pt").write_bytes(b""),
    "no digests": lambda folder: (folder / "files.json").unlink(),
    "broken digests": lambda folder: (folder / "files.json").write_text('{"factors.s'),
    "other digests": lambda folder: (folder / "files.json").write_text("[]"),
    "digests of nothing": lambda folder: (folder / "files.json").write_text("{}"),
    "cut before it was marked": cut_and_mark,
    "no state before it was marked": lambda folder: cut_and_mark(folder, "trainer_state.json"),
}


@pytest.fixture(scope="module")
def stopped(tiny_folder, tmp_path_factory):
    """A run stopped at step 5 with the checkpoints of steps 2 and 4, and the whole run."""
    folder = tmp_path_factory.mktemp("damage")
    config = train_config(tiny_folder, folder / "stopped")
    with pytest.MonkeyPatch.context() as patch:
        run = interrupted(config, patch, 5)
    found = [checkpoints.step_of(path) for path in run.checkpoints.glob("checkpoint-*")]
    assert sorted(found) == [2, 4]
    return config, run, train_one(train_config(tiny_folder, folder / "whole"))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(stopped, tmp_path, capsys, kind):
    checkpoints_of = tmp_path / "checkpoints"
    shutil.copytree(stopped[1].checkpoints, checkpoints_of)
    DAMAGE[kind](checkpoints_of / "checkpoint-4")
    assert checkpoints.newest(checkpoints_of) == checkpoints_of / "checkpoint-2"
    assert "checkpoint-4: damaged" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("kind", ["a flipped byte", "cut before it was marked"])
def test_a_run_with_a_damaged_checkpoint_ends_like_one_that_was_not(
    stopped, tmp_path, capsys, kind
):
    config, run, whole = stopped
    config = dataclasses.replace(config, run=str(tmp_path / "run"))
    shutil.copytree(run.path, config.run)
    run = Run(config.run)
    DAMAGE[kind](run.checkpoints / "checkpoint-4")
    train_one(config)
    said = capsys.readouterr().err.replace("\n", "")
    assert "checkpoint-4: damaged" in said and "Resuming from" in said
    assert_same(run, whole)


def test_all_damaged_begins_anew(stopped, tmp_path, capsys):
    config, run, whole = stopped
    config = dataclasses.replace(config, run=str(tmp_path / "run"))
    shutil.copytree(run.path, config.run)
    for step in (2, 4):
        flip_a_byte(Path(config.run) / "train" / "checkpoints" / f"checkpoint-{step}")
    train_one(config)
    assert_same(Run(config.run), whole)


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_room(
    stopped, tiny_folder, tmp_path
):
    """The system lets no file grow beyond what a checkpoint needs."""
    config = train_config(tiny_folder, tmp_path / "run")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        with pytest.raises(RunError, match="cannot be written"):
            train_one(config)

    assert ended(forked(limited)) == 0
    assert list(Run(config.run).path.glob("**/.*")) == []
    assert_same(train_one(config), stopped[2])


def test_metrics_are_rewritten_in_one_step(stopped, tmp_path):
    """A kill while a resumed run takes back rows loses none of the others."""
    config, run, whole = stopped
    config = dataclasses.replace(config, run=str(tmp_path / "run"))
    shutil.copytree(run.path, config.run)
    run = Run(config.run)
    before = run.metrics.read_bytes()

    def killed() -> None:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        train_one(config)

    assert ended(forked(killed)) == -signal.SIGKILL
    assert run.metrics.read_bytes() == before
    assert_same(train_one(config), whole)


def saved(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True, exist_ok=True)
    save_file({"step": torch.tensor(step)}, path / "factors.safetensors")
    return path


def test_the_newest_checkpoint_counts_by_its_step(tmp_path):
    for step in (9, 10, 100, 20):
        checkpoints.mark(saved(tmp_path, step))
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-100"
    assert checkpoints.newest(tmp_path / "nothing") is None


def test_what_is_half_written_is_passed_over(tmp_path):
    checkpoints.mark(saved(tmp_path, 1))
    half = saved(tmp_path, 2)
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-1"
    checkpoints.mark(half)
    assert checkpoints.newest(tmp_path) == half


def test_a_step_saved_again_replaces_a_damaged_one(tmp_path):
    first = saved(tmp_path, 1)
    checkpoints.mark(first)
    (first / "factors.safetensors").write_text("damaged")
    assert checkpoints.newest(tmp_path) is None
    checkpoints.mark(saved(tmp_path, 1))
    assert checkpoints.newest(tmp_path) == first
