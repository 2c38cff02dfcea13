"""Where a study is kept: named if it cannot be reached, and made whole whatever a kill left."""

import errno
import os
import re
import signal
from pathlib import Path

import optuna
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from elastic.errors import RunError
from elastic.files import BUILDING
from elastic.searching import workers
from elastic.searching.workers import open_storage
from tests.helpers.children import ended, forked
from tests.helpers.exports import small_files


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("/nowhere/at/all/study.journal", "no directory /nowhere/at/all"),
        ("sqlite:////nowhere/study.db", "unable to open database file"),
        ("postgresql+nodriver://host/db", "Can't load plugin"),
        ("grpc://127.0.0.1:1", "timeout"),
    ],
)
def test_a_storage_that_cannot_be_reached_is_named(tmp_path, monkeypatch, place, reason):
    monkeypatch.setattr(workers, "CONNECT", 0.2)
    expected = f"study.storage {re.escape(place)} cannot be reached: .*{reason}"
    with pytest.raises(RunError, match=expected):
        open_storage(place, tmp_path)


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("nodriver://me:pa:ss/w@rd@host:5/db", "nodriver://me:***@host:5/db"),
        ("nodriver://host/db?user=me&password=secret&a=b", "nodriver://host/db?user=me&password=***&a=b"),
        ("nodriver://me@host/db", "nodriver://me@host/db"),
        ("nodriver:///folder/a:b.db", "nodriver:///folder/a:b.db"),
    ],
)  # fmt: skip
def test_a_password_is_never_shown(tmp_path, place, shown):
    with pytest.raises(RunError) as caught:
        open_storage(place, tmp_path)
    assert f"study.storage {shown} cannot" in str(caught.value)
    assert "secret" not in str(caught.value) and "ss/w@rd" not in str(caught.value)


def test_a_database_whose_making_was_killed_is_made_again(tmp_path):
    """Its tables and their indices are made one by one; without the one of names, every start
    would add another study."""
    place, name = f"sqlite:///{tmp_path / 'study.db'}", "kept"

    def doomed() -> None:
        @event.listens_for(Engine, "before_cursor_execute")
        def kill(_connection, _cursor, statement, *_):
            if "CREATE UNIQUE INDEX" in statement:
                os.kill(os.getpid(), signal.SIGKILL)

        open_storage(place, tmp_path)

    assert ended(forked(doomed)) == -signal.SIGKILL
    for _ in range(2):
        (tmp_path / f".scratch.abcd{BUILDING}").mkdir(exist_ok=True)  # of one killed a bit later
        storage = open_storage(place, tmp_path)
        optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
    assert [study.study_name for study in storage.get_all_studies()] == [name]
    assert [path.name for path in tmp_path.iterdir()] == ["study.db"]


# The journal.


def journal(tmp_path) -> tuple[optuna.Study, Path]:
    study = optuna.create_study(storage=open_storage(None, tmp_path), study_name="kept")
    study.enqueue_trial({"x": 1})
    return study, tmp_path / "study.journal"


@pytest.mark.parametrize("left", [b'{"op_code": 5, "wor', b"\0" * 64])
def test_an_unfinished_last_line_is_cut_before_another_is_appended(tmp_path, capsys, left):
    """As a kill, a full disk or the loss of power leaves it; also under a worker that lives on."""
    study, file = journal(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole + left)
    study.enqueue_trial({"x": 2})
    assert file.read_bytes().startswith(whole + b"{")
    assert f"cut an unfinished last line of {len(left)} bytes" in capsys.readouterr().err.replace(
        "\n", " "
    )
    file.write_bytes(file.read_bytes() + left)
    again = optuna.load_study(storage=open_storage(None, tmp_path), study_name="kept")
    again.enqueue_trial({"x": 3})
    fresh = optuna.load_study(storage=open_storage(None, tmp_path), study_name="kept")
    assert [t.system_attrs["fixed_params"]["x"] for t in fresh.trials] == [1, 2, 3]


def test_a_full_disk_names_the_journal(tmp_path):
    study, file = journal(tmp_path)
    with small_files(file.stat().st_size), pytest.raises(RunError, match=rf"^{file}: cannot be w"):
        study.enqueue_trial({"x": 2})
    study.enqueue_trial({"x": 3})
    assert [t.system_attrs["fixed_params"]["x"] for t in study.trials] == [1, 3]


def test_a_lock_ends_with_its_process(tmp_path, monkeypatch):
    """Also of a journal that was named by a relative path; and it leaves no file."""
    monkeypatch.chdir(tmp_path)
    journal(Path("."))

    def doomed() -> None:
        workers.JournalLock(Path("study.journal")).acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(forked(doomed)) == -signal.SIGKILL
    study = optuna.load_study(storage=open_storage(None, Path(".")), study_name="kept")
    study.enqueue_trial({"x": 2})
    assert len(study.trials) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["study.journal"]


def test_who_has_locked_a_journal_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "LONG", 0.0)
    study, file = journal(tmp_path)
    said, first = [], workers.JournalLock(file)

    def say(text):
        said.append(text)
        first.release()

    monkeypatch.setattr(workers, "say", say)
    first.acquire()
    study.enqueue_trial({"x": 2})
    assert said == [f"{file}: waiting for process {os.getpid()}, which has locked it"]


def test_where_nothing_can_be_locked_a_file_beside_does(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    study, file = journal(tmp_path)
    lock = workers.JournalLock(file)
    lock.acquire()
    assert (tmp_path / "study.journal.lock").is_file()
    lock.release()
    study.enqueue_trial({"x": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["study.journal"]
