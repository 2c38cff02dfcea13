"""Rows that a user has in Python: dictionaries, a pandas DataFrame, a `datasets.Dataset`, a pyarrow
Table, or the name of a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic.config import TaskConfig
from elastic.data import columnar
from elastic.data.hub import classes_of_columns, named
from elastic.data.reading import read_rows
from elastic.data.rows import example_of
from elastic.data.task import Example
from elastic.errors import DataError, MissingExtra

Row = Mapping[str, Any]
Rows = Any
"""What `rows_of` takes: some of it are types of libraries that need not be there."""
KNOWN = (
    "a DataFrame, a datasets.Dataset, a pyarrow Table, dictionaries by the name of the field, or "
    "the path of a file"
)


def examples_of(data: Rows, config: TaskConfig, name: str) -> list[Example]:
    """Examples as they are, or made of rows by the templates and fields of `config`; DataError
    where there are none, or names the row and its field that cannot be used."""
    if isinstance(data, Sequence) and data and all(isinstance(one, Example) for one in data):
        return list(data)
    return [example_of(row, config, where) for where, row in rows_of(data, name)]


def rows_of(data: Rows, name: str) -> list[tuple[str, Row]]:
    """Rows, each with where it stands: in a file, or behind `name` counted from 1. Missing values
    of a DataFrame are None, numbered classes of a Dataset their names. DataError for something
    else, for no rows, and for a column that holds values of several types."""
    if isinstance(data, str | Path):
        return read_rows(data)
    if _is_columnar(data):
        found: list[Any] = _listed(data, name)
    elif isinstance(data, Iterable) and not isinstance(data, Mapping):
        found = list(data)
    else:
        parts = f" with {', '.join(map(str, data))}" if isinstance(data, Mapping) else ""
        raise DataError(f"{name} is a {type(data).__name__}{parts}; give {KNOWN}")
    classes = classes_of_columns(getattr(data, "features", None) or {})
    rows = [(f"{name}: row {number}", row) for number, row in enumerate(found, 1)]
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise DataError(f"{where} is a {type(row).__name__}; give {KNOWN}")
    if not rows:
        raise DataError(f"{name}: no rows; give {KNOWN}")
    return [(where, named(row, classes)) for where, row in rows]


def _is_columnar(data: Any) -> bool:
    """Whether it hands its columns over as Arrow does: pandas, polars and pyarrow tables do."""
    return hasattr(data, "__arrow_c_stream__")


def _listed(data: Any, name: str) -> list[dict[str, Any]]:
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtra("pyarrow", "datasets", f"{name}, a {type(data).__name__},") from error
    try:
        return columnar.listed(pyarrow.table(data), name)
    except (pyarrow.ArrowException, ValueError) as error:
        told = "; ".join(map(str, error.args))
        raise DataError(
            f"{name}, a {type(data).__name__}: {told}; give a column one type"
        ) from None
