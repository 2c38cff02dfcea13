"""The latency tables of a study, one for every precision: given, known here or measured now."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.config import SearchConfig, TableConfig
from elastic.console import say
from elastic.errors import RunError
from elastic.files import read_json
from elastic.latency.latency_table import Timetable, known_timetable, read_timetable, record
from elastic.latency.target import Target
from elastic.searching.workers import Worker

if TYPE_CHECKING:
    import optuna

    from elastic.supernet.supernet import Supernet


Given = Mapping[str | None, tuple[str, dict[str, Any]]]
"""By compression (None: as it is), the file of a table and what is in it."""


def read_tables(config: TableConfig, targets: Mapping[str | None, Target]) -> Given:
    """The files that were given; RunError for one of something else. Reads no weights."""
    found: dict[str | None, tuple[str, dict[str, Any]]] = {}
    for file in config.file:
        mode = _compression_in(file)
        if mode in found or mode not in targets:
            known = ", ".join(each or "none" for each in targets)
            raise RunError(
                f"table.file {file} was recorded with compress {mode or 'none'}; give one table "
                f"for each of: {known}"
            )
        found[mode] = file, read_timetable(file, targets[mode], config.target)
    if config.target and (missing := [mode for mode in targets if mode not in found]):
        raise RunError(
            f"table.target {config.target!r}: without a table of it for compress "
            f"{', '.join(each or 'none' for each in missing)}; record one there: elastic latency "
            f"RUN --compress {missing[-1] or 'none'} --save FILE"
        )
    return found


def require_same_tables(study: optuna.Study, given: Given) -> None:
    """RunError unless these are what the study was begun with."""
    for mode, (file, value) in given.items():
        if study.user_attrs.get(_attribute(mode), value) != value:
            raise RunError(
                f"table.file {file} is not the latency table that this study was begun with; give "
                "another study.name, or leave table.file out"
            )


def tables_of(
    worker: Worker,
    net: Supernet,
    targets: Mapping[str | None, Target],
    given: Given,
    config: SearchConfig,
) -> dict[str | None, Timetable]:
    """In one unit, shared by all workers of the study."""
    found: dict[str | None, Timetable] = {}
    for mode, target in targets.items():
        _, value = given.get(mode, (None, None))
        make = functools.partial(_contents, net, target, value, config)
        timetable = Timetable.from_dict(worker.once(_attribute(mode), make), net.space)
        say(timetable.describe())
        if not timetable.trusted:
            say("To measure it again on a quiet machine, search under another study.name")
        found[mode] = timetable.beside(found[None]) if found else timetable
    return found


def _contents(
    net: Supernet, target: Target, given: dict[str, Any] | None, config: SearchConfig
) -> dict[str, Any]:
    """Of a table: given, known or measured now."""
    known = given or known_timetable(target, config.table)
    if not known:
        return record(net, target, config.timing, config.table, config.seed).as_dict()
    Timetable.from_dict(known, net.space)  # it may be of another space: refused unstored
    return known


def _attribute(mode: str | None) -> str:
    """Under which a study keeps its table."""
    return f"timetable {mode}" if mode else "timetable"


def _compression_in(file: Path | str) -> str | None:
    """In which mode it was recorded; None, too, where it is no table."""
    value = read_json(file)
    target = value.get("target") if isinstance(value, dict) else None
    return target.get("compress") if isinstance(target, dict) else None
