"""What is written is there as a whole, or what was there before still is."""

import contextlib
import errno
import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic import files
from elastic.errors import ConfigError, RunError
from elastic.files import new_directory, read_json, shipped, write_json, write_text
from tests.helpers.children import ended, forked


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=8))
def test_json_survives(tmp_path, value):
    file = tmp_path / "deep" / "er" / "value.json"
    assert write_json(file, value) == file
    assert read_json(file) == value
    assert names(file.parent) == ["value.json"]


def test_text_replaces_text_and_can_be_read_by_others(tmp_path):
    file = tmp_path / "a.txt"
    for text in ("one", "two Δ"):
        write_text(file, text)
        assert file.read_text(encoding="utf-8") == text
    assert file.stat().st_mode & 0o777 == 0o644
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()])
def test_a_failing_write_keeps_the_old_text(tmp_path, monkeypatch, where, error):
    file = write_text(tmp_path / "a.txt", "old")

    def fail(*args):
        raise error

    monkeypatch.setattr(files.os, where, fail)
    with pytest.raises(type(error)):
        write_text(file, "new")
    monkeypatch.undo()
    assert file.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_what_is_no_json_is_refused_before_writing(tmp_path):
    file = write_json(tmp_path / "a.json", 1)
    for value in (float("nan"), float("inf"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(file, value)
    assert read_json(file) == 1 and names(tmp_path) == ["a.json"]


def test_reading_names_the_file_and_line(tmp_path):
    with pytest.raises(RunError, match=r"no\.json: no such file"):
        read_json(tmp_path / "no.json")
    (tmp_path / "a.json").write_text('{\n"a": }')
    with pytest.raises(RunError, match=r"a\.json:2: broken JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES]
)
def test_a_full_or_closed_disk_names_the_path(tmp_path, monkeypatch, code):
    file = write_text(tmp_path / "a.txt", "old")

    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(RunError) as caught:
        write_text(file, "new")
    assert str(file) in str(caught.value) and os.strerror(code) in str(caught.value)
    with pytest.raises(RunError) as caught, new_directory(tmp_path / "folder"):
        raise OSError(code, os.strerror(code))
    assert f"{tmp_path}/folder: " in str(caught.value)
    assert file.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_disk_that_is_full_under_torch_names_the_path(tmp_path):
    """Its writer says only how far it came."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        with pytest.raises(RunError, match="cannot be written"), files.named_failure(tmp_path):
            torch.save(torch.zeros(100_000), tmp_path / "a.pt")

    assert ended(forked(limited)) == 0
    with pytest.raises(RuntimeError, match="of another kind"), files.named_failure(tmp_path):
        raise RuntimeError("of another kind")


# Directories


def test_a_directory_appears_when_its_block_ends(tmp_path):
    folder = tmp_path / "deep" / "folder"
    with new_directory(folder) as building:
        (building / "a").write_text("1")
        assert not folder.exists()
    assert names(folder) == ["a"] and names(folder.parent) == ["folder"]
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_directory_replaces_the_old_one_as_a_whole(tmp_path):
    folder = tmp_path / "folder"
    for name in ("old", "new"):
        with new_directory(folder) as building:
            (building / name).write_text(name)
            if name == "new":
                assert names(folder) == ["old"]
    assert names(folder) == ["new"] and names(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), OSError(errno.EIO, "x")])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failing_block_leaves_what_was_there(tmp_path, error, existed):
    folder = tmp_path / "folder"
    if existed:
        folder.mkdir()
        (folder / "old").write_text("old")
    with pytest.raises(type(error)), new_directory(folder) as building:
        (building / "new").write_text("new")
        raise error
    assert names(tmp_path) == (["folder"] if existed else [])
    if existed:
        assert names(folder) == ["old"]


def test_a_failing_exchange_puts_the_old_directory_back(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("old")
    rename, calls = os.rename, []

    def third_fails(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise OSError(errno.EIO, "I/O error")
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", third_fails)
    with pytest.raises(OSError, match="I/O error"), new_directory(folder) as building:
        (building / "new").write_text("new")
    assert names(folder) == ["old"] and names(tmp_path) == ["folder"]


# What comes with the package


@pytest.mark.parametrize("folder", ["search_spaces", "configs"])
def test_shipped_finds_every_file_by_name(folder):
    home = Path(files.__file__).parent.parent / folder
    assert list(home.glob("*.yaml"))
    for path in home.glob("*.yaml"):
        assert shipped(folder, path.stem) == path
        assert shipped(folder, str(path)) == path


def test_shipped_suggests():
    with pytest.raises(ConfigError, match="unknown search space 'lama'; did you mean 'llama'"):
        shipped("search_spaces", "lama")
    with pytest.raises(ConfigError, match=r"none/mine\.yaml: no such file"):
        shipped("search_spaces", "none/mine.yaml")


def test_a_path_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("llama.yaml").write_text(json.dumps({}))
    assert shipped("search_spaces", "llama.yaml") == Path("llama.yaml")
    assert shipped("search_spaces", "llama") != Path("llama.yaml")


# Killed in the middle


def killed_at(moment, act) -> None:
    """A child process dies by SIGKILL when it calls `moment`, a function of `os`, in `act`."""

    def doomed() -> None:
        calls = []

        def die(*arguments, **more):
            calls.append(arguments)
            if len(calls) == moment[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)

        real = getattr(os, moment[0])
        setattr(os, moment[0], die)
        act()

    assert ended(forked(doomed)) == -signal.SIGKILL


def fill(folder: Path) -> None:
    with new_directory(folder) as building:
        (building / "new").write_text("new")


MOMENTS = {"full": ("chmod", 1), "before": ("rename", 2), "between": ("rename", 3)}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("place", ["folder", "other"])
def test_a_killed_process_leaves_the_old_directory_and_the_next_one_clears_up(
    tmp_path, moment, place
):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("old")
    killed_at(MOMENTS[moment], lambda: fill(folder))
    left = names(tmp_path)
    assert any(name.endswith(files.BUILDING) for name in left)
    assert ("folder" in left) == (moment != "between")
    assert not folder.exists() or names(folder) == ["old"]
    with new_directory(tmp_path / place) as building:
        # Whatever happened between its two renames, the old one is back.
        assert names(folder) == ["old"]
        (building / "newer").write_text("newer")
    assert names(tmp_path) == sorted({"folder", place})
    assert names(tmp_path / place) == ["newer"]


@pytest.mark.parametrize(
    ("moment", "content"), [(("fsync", 1), "old"), (("replace", 1), "old"), (("rmdir", 1), "new")]
)
def test_what_a_killed_write_left_is_cleared_by_the_next_one(tmp_path, moment, content):
    file = write_text(tmp_path / "a.txt", "old")
    killed_at(moment, lambda: write_text(file, "new"))
    assert file.read_text() == content
    left = [path for path in tmp_path.iterdir() if path != file]
    assert len(left) == 1 and files.is_leftover(left[0])
    write_text(tmp_path / "b.txt", "b")
    assert file.read_text() == content and names(tmp_path) == ["a.txt", "b.txt"]


def test_two_that_fill_one_directory_at_once_both_end(tmp_path):
    """The last one's stands, and nothing else does."""
    folder = tmp_path / "folder"
    fill(folder)
    for _ in range(3):
        children = [forked(lambda: [fill(folder) for _ in range(10)]) for _ in range(3)]
        assert [ended(child) for child in children] == [0, 0, 0]
        assert names(folder) == ["new"] and names(tmp_path) == ["folder"]


def test_a_lock_of_what_was_replaced_meanwhile_is_of_the_new_one(tmp_path):
    file = write_text(tmp_path / "a.txt", "old")
    with contextlib.ExitStack() as first:
        assert first.enter_context(files.lock(file))

        def replace(who: str) -> None:
            assert who == f"process {os.getpid()}"
            write_text(file, "new")
            first.close()

        with files.lock(file, wait=True, say=replace) as alone, files.lock(file) as other:
            assert alone and not other


def test_a_scratch_folder_of_a_killed_process_goes_with_the_next_one(tmp_path):
    def dies() -> None:
        with files.scratch(tmp_path / "timing") as folder:
            (folder / "large.onnx").write_text("")
            os.rmdir("nowhere")

    killed_at(("rmdir", 1), dies)
    assert len(names(tmp_path / "timing")) == 1
    with files.scratch(tmp_path / "timing") as folder:
        assert names(tmp_path / "timing") == [folder.name]
    assert names(tmp_path / "timing") == []


def test_what_another_process_is_filling_stays(tmp_path):
    with new_directory(tmp_path / "one") as one:
        (one / "a").write_text("1")
        with new_directory(tmp_path / "other") as other:
            (other / "b").write_text("2")
        assert (one / "a").is_file()
    assert names(tmp_path) == ["one", "other"]
    mine = tmp_path / ".mine"
    mine.mkdir()
    with new_directory(tmp_path / "third"):
        pass
    assert mine.is_dir()


@pytest.mark.parametrize("links", [True, False])
def test_a_file_under_another_name_outlives_the_first(tmp_path, monkeypatch, links):
    def refuse(*_):
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"known")
    files.same_file(first, second)
    assert second.samefile(first) == links
    files.write_text(first, "replaced")
    assert second.read_bytes() == b"known"
