"""A run directory belongs to one command at a time, and knows what a kill has left in it."""

import contextlib
import errno
import fcntl
import os

import pytest

from elastic import run as run_module
from elastic.config import TrainConfig
from elastic.errors import RunError
from elastic.files import BUILDING, lock
from elastic.run import Run, waiting


def test_what_a_kill_in_the_first_write_left_is_no_other_run(tmp_path):
    run = Run(tmp_path / "run")
    left = run.path / f".config.yaml.abcd{BUILDING}"
    left.mkdir(parents=True)
    (left / "config.yaml").write_text("half a")
    assert run.claim(TrainConfig()) is False
    run.begin(TrainConfig())
    assert list(run.path.iterdir()) == [run.config_file]
    (run.path / ".hidden").write_text("whose?")
    run.config_file.unlink()
    with pytest.raises(RunError, match="not a run"):
        run.claim(TrainConfig())


def test_what_training_needs_no_more_is_cleared(tmp_path):
    run = Run(tmp_path / "run")
    (run.checkpoints / "checkpoint-2").mkdir(parents=True)
    (run.path / "train" / f".metrics.jsonl.abcd{BUILDING}").mkdir()
    for file in (run.moments, run.metrics):
        file.write_text("")
    run.clear()
    assert list((run.path / "train").iterdir()) == [run.metrics]


def test_one_that_waits_says_for_whom(tmp_path, monkeypatch):
    said = []
    with contextlib.ExitStack() as first:

        def say(text):
            said.append(text)
            first.close()

        monkeypatch.setattr(run_module, "say", say)
        first.enter_context(waiting(tmp_path, "trains it"))
        with Run(tmp_path).alone(), lock(tmp_path) as other:
            assert not other
    assert said == [f"{tmp_path}: waiting for process {os.getpid()}, which trains it"]


def test_where_nothing_can_be_locked_that_is_said(tmp_path, monkeypatch):
    """As on some network file systems, whose locks want files that may be written."""

    def refuse(*_):
        raise OSError(errno.EBADF, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    said = []
    monkeypatch.setattr(run_module, "say", said.append)
    with waiting(tmp_path, "trains it"):
        pass
    assert said == [
        f"{tmp_path}: this file system locks no folders; run one command at a time on it"
    ]


def test_a_folder_that_nothing_came_into_goes_again(tmp_path):
    folder = tmp_path / "a" / "b"
    with pytest.raises(RunError), waiting(folder, ""):
        assert folder.is_dir()
        raise RunError("refused")
    assert list(tmp_path.iterdir()) == []
    folder.mkdir(parents=True)
    with waiting(folder, ""):
        pass
    assert folder.is_dir()
