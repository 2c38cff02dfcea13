"""Rows that a user has in Python, kept in the run directory, so that the other commands, and the
same one again, find what they need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elastic import distributed
from elastic.config import TrainConfig
from elastic.data.given import Rows, rows_of
from elastic.data.task import SPLITS, Split
from elastic.errors import ConfigError, DataError, RunError, unknown
from elastic.files import write_text
from elastic.run import Run


def kept(config: TrainConfig, data: Mapping[Split, Rows]) -> TrainConfig:
    """The settings of a run on these rows, by split, which now stand in files below RUN/rows.

    ConfigError for another split, or without train and test; DataError for a value that JSON does
    not have; RunError, and nothing is written, where the run began with other rows or settings.
    """
    for split in data:
        if split not in SPLITS:
            raise ConfigError(f"data: {unknown('split', str(split), SPLITS)}")
    for split in ("train", "test"):
        if split not in data:
            raise ConfigError(f"data: no {split} rows; give train and test, and perhaps validation")
    run = Run(config.run)
    files = {split: run.rows / f"{split}.jsonl" for split in SPLITS if split in data}
    places: dict[str, Any] = {split: str(file) for split, file in files.items()}
    config = replace(config, task=replace(config.task, name="jsonl", **places))
    run.claim(config)
    texts = {split: _lines(rows, split) for split, rows in data.items()}
    with run.alone():
        new = {
            split: file
            for split, file in files.items()
            if not file.is_file() or file.read_text(encoding="utf-8") != texts[split]
        }
        for split, file in new.items():
            if file.is_file() and run.config_file.is_file():  # else nothing has begun with them
                raise RunError(
                    f"{run.path} began with other {split} rows ({file}); give the same ones, or "
                    "choose another run"
                )
        with distributed.main_first():
            for split, file in new.items():
                if distributed.is_main():
                    write_text(file, texts[split])
    return config


def _lines(rows: Rows, split: Split) -> str:
    """One JSON object per row; DataError names the field of a value that is none."""
    return "".join(f"{_line(row, where)}\n" for where, row in rows_of(rows, split))


def _line(row: Mapping[str, Any], where: str) -> str:
    try:
        return _json(dict(row))
    except (TypeError, ValueError):
        for name, value in row.items():
            try:
                _json({name: value})
            except (TypeError, ValueError):
                told = f"{type(value).__name__} {value!a}"[:80]
                raise DataError(
                    f"{where}: field {name!r} is {told}; give a text, a number, true, false, null, "
                    "or lists and objects of them"
                ) from None
        raise


def _json(value: Any) -> str:
    """ValueError for half a character, too, which no file holds."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()
    return text
