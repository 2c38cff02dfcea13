"""Rows of columnar files, through pyarrow: Parquet, and Arrow as a file (Feather) or as a stream,
which is what `datasets` keeps. They are known by their first bytes, whatever they are called."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

from elastic.errors import DataError, MissingExtra

PARQUET, ARROW, STREAM, FEATHER = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"FEA1"
NAMES = {PARQUET: "Parquet", ARROW: "Arrow", STREAM: "Arrow", FEATHER: "Feather"}
"""By what a file begins with. FEATHER is its version 1, which only older tools write."""


def form_of(content: bytes) -> str | None:
    """What kind of columnar file this is; None: none."""
    return next((name for start, name in NAMES.items() if content.startswith(start)), None)


def rows_in(content: bytes, file: Path | str) -> list[dict[str, Any]]:
    """All rows of one; DataError for one that is broken, or has two columns of one name,
    MissingExtra without pyarrow."""
    name = form_of(content)
    if content.startswith(FEATHER):
        raise DataError(
            f"{file}: Feather of version 1; write it anew with version 2, or as Parquet"
        )
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "datasets", f"{file}, which is {name},") from error
    read = {
        PARQUET: pyarrow.parquet.read_table,
        ARROW: lambda source: pyarrow.ipc.open_file(source).read_all(),
        STREAM: lambda source: pyarrow.ipc.open_stream(source).read_all(),
    }
    [reader] = (read[start] for start in read if content.startswith(start))
    try:
        return listed(reader(io.BytesIO(content)), f"{file}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: broken {name}: {' '.join(str(error).split())[:200]}") from None


def listed(table: Any, where: str) -> list[dict[str, Any]]:
    """The rows of a `pyarrow.Table`, null as None; DataError for two columns of one name, of which
    a row would keep one."""
    twice = sorted(name for name, count in Counter(table.column_names).items() if count > 1)
    if twice:
        raise DataError(f"{where}: two columns are called {', '.join(twice)}")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
