"""Checkpoints that are whole or not there: written aside, digested, then renamed.

DIRECTORY/checkpoint-N/ is one of them, DIRECTORY/building/ what a kill may have left half-written.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from elastic.console import say
from elastic.errors import RunError
from elastic.files import digest, read_json, write_json

BUILDING = "building"
DIGESTS = "files.json"
KEPT = 2
"""One to resume from, and one before it in case that one is damaged."""


def publish(built: Path, directory: Path) -> Path:
    """Move a finished checkpoint from `built` to where it is found; old ones beyond KEPT go."""
    write_json(built / DIGESTS, {name: digest(built / name) for name in _files(built)})
    target = directory / built.name
    _remove(target)  # of an earlier attempt at the same step, damaged or it would have been used
    os.rename(built, target)
    for old in _newest_first(directory)[KEPT:]:
        _remove(old)
    return target


def newest(directory: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are named and passed over."""
    for folder in _newest_first(directory):
        reason = damage(folder)
        if reason is None:
            return folder
        say(f"{folder}: damaged ({reason}); trying the checkpoint before it")
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None when every file is as it was written."""
    try:
        digests = read_json(folder / DIGESTS)
        wrong = [name for name, value in digests.items() if digest(folder / name) != value]
    except (RunError, OSError, AttributeError) as error:
        return str(error)
    return f"{wrong[0]} has changed since it was written" if wrong else None


def step_of(folder: Path) -> int:
    """Optimiser steps done at a checkpoint."""
    return int(folder.name.rpartition("-")[2])


def _newest_first(directory: Path) -> list[Path]:
    found = [path for path in directory.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def _files(folder: Path) -> list[str]:
    """Every file below the folder, written through to the disk."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != DIGESTS:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            found.append(str(path.relative_to(folder)))
    return found


def _remove(folder: Path) -> None:
    """Rename first: a kill in the middle must not leave a checkpoint with half of its files."""
    if folder.exists():
        aside = folder.with_name(f"{BUILDING}.{folder.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
