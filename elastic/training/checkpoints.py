"""Checkpoints that are whole or passed over: digests of all files are written last, as the mark.

DIRECTORY/checkpoint-N/ is one of them; without its mark it is what a kill left half-written.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import safe_globals

from elastic.console import say
from elastic.errors import RunError
from elastic.files import digest, read_json, write_json
from elastic.plain import one_line, shaped

DIGESTS = "files.json"
KEPT = 2
"""One to resume from, and one before it in case that one is damaged."""


class MarkWhole(TrainerCallback):
    """Marks every checkpoint once all processes have written their part of it."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        processes = PartialState()
        processes.wait_for_everyone()
        if processes.is_main_process:
            mark(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        processes.wait_for_everyone()


def mark(folder: Path) -> None:
    """Write the digest of every file below, each through to the disk before it."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != DIGESTS:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            digests[str(path.relative_to(folder))] = digest(path)
    write_json(folder / DIGESTS, digests)


def newest(directory: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are named and passed over."""
    folders = [path for path in directory.glob("checkpoint-*") if path.name[11:].isdigit()]
    for folder in sorted(folders, key=step_of, reverse=True):
        reason = damage(folder)
        if reason is None:
            return folder
        say(f"{folder}: damaged ({reason}); trying the checkpoint before it")
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None when every file is as it was written."""
    try:
        digests = shaped(read_json(folder / DIGESTS), dict, folder / DIGESTS)
        wrong = [name for name, value in digests.items() if digest(folder / name) != value]
    except (RunError, OSError, ValueError) as error:
        return str(error)
    if wrong or not digests:
        return f"{wrong[0]} has changed since it was written" if wrong else "it lists no files"
    return _unreadable(folder)


def _unreadable(folder: Path) -> str | None:
    """What cannot be read though it is as it was written; nothing but tensors and numbers is
    unpickled."""
    for path in sorted(folder.glob("*")):
        try:
            if path.suffix in (".pt", ".pth"):
                with safe_globals():
                    torch.load(path, map_location="cpu", weights_only=True)
            elif path.suffix == ".safetensors":
                safe_open(path, "pt")
            elif path.suffix == ".json":
                read_json(path)
        except Exception as error:  # the library and those it reads files with raise many kinds
            return f"{path.name} cannot be read: {one_line(error)}"
    return None


def step_of(folder: Path) -> int:
    """Optimiser steps done at a checkpoint."""
    return int(folder.name.rpartition("-")[2])
