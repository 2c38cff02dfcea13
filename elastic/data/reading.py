"""Rows as files hold them: JSON Lines, a JSON list, CSV, TSV, Parquet or Arrow, as they are or in
gzip."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from elastic.data import columnar
from elastic.errors import DataError, DataMissing

DELIMITERS = {".csv": ",", ".tsv": "\t"}
GZIP = b"\x1f\x8b"
OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
"""What compressed files begin with."""
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
"""Byte-order marks; that of UTF-8 is read over."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_rows(file: Path | str) -> list[tuple[str, Mapping[str, Any]]]:
    """Rows of a file, each with where it stands; DataError names the line that is no row,
    DataMissing a file that is not there."""
    content = _bytes(file)
    name = Path(file).name.removesuffix(".gz")
    rows: list[tuple[str, Mapping[str, Any]]]
    if columnar.form_of(content):
        read = columnar.rows_in(content, file)
        rows = [(f"{file}: row {number}", row) for number, row in enumerate(read, 1)]
    else:
        text = _decoded(content, file)
        if Path(name).suffix in DELIMITERS:
            rows = list(_table(text, file, DELIMITERS[Path(name).suffix]))
        elif text.lstrip().startswith("[") and not name.endswith(".jsonl"):
            listed = _json(text, str(file), lines=True)
            rows = [(f"{file}: row {number}", row) for number, row in enumerate(listed, 1)]
        else:
            lines = enumerate(text.split("\n"), 1)
            places = [(f"{file}:{number}", line) for number, line in lines if line.strip()]
            rows = [(where, _json(line, where)) for where, line in places]
    if not rows:
        raise DataError(
            f"{file}: no rows; expected a JSON list, one JSON object per line, CSV, TSV, Parquet "
            "or Arrow"
        )
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return rows


def read_json(file: Path | str) -> Any:
    """What a JSON file holds; DataError names the line that is broken."""
    return _json(read_text(file), str(file), lines=True)


def read_text(file: Path | str) -> str:
    """The text of a file; DataError says how it is written if that is not UTF-8, DataMissing that
    it is not there."""
    return _decoded(_bytes(file), file)


def _bytes(file: Path | str) -> bytes:
    """What a file holds, unpacked if it is in gzip."""
    try:
        content = Path(file).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DataMissing(f"{file}: no such data file") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    if not content.startswith(GZIP):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: broken gzip: {error}") from None


def _decoded(content: bytes, file: Path | str) -> str:
    for start, name in OTHERS.items():
        if content.startswith(start):
            raise DataError(f"{file}: compressed with {name}; unpack it, or pack it with gzip")
    for mark, name in MARKS.items():
        if content.startswith(mark):
            raise DataError(f"{file}: {name} text; {_converted(file, name)}")
    if (zero := content.find(b"\0")) >= 0:
        name = "UTF-16LE" if zero % 2 else "UTF-16BE"
        raise DataError(
            f"{file}: byte {zero} is zero: {name} without its mark, or no text at all; "
            f"{_converted(file, name)}"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise DataError(
            f"{file}:{line}: not UTF-8 text (byte 0x{byte:02x}), perhaps Latin-1; "
            f"{_converted(file, 'ISO-8859-1')}"
        ) from None


def _converted(file: Path | str, encoding: str) -> str:
    return f"convert it: iconv -f {encoding} -t UTF-8 {file} > NEW"


def _json(text: str, where: str, *, lines: bool = False) -> Any:
    """What a text says as JSON; DataError where it is broken, or says what no text or number is.
    `lines`: it has several, one of which is named."""
    try:
        found = json.loads(text, parse_constant=_no_number, parse_float=_finite)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        at = f"{where}:{error.lineno}" if lines else where
        column = "" if lines else f" at column {error.colno}"
        raise DataError(f"{at}: broken JSON: {error.msg}{column}") from None
    except RecursionError:
        raise DataError(f"{where}: lists or objects are nested too deep to be read") from None
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half a character (\\u{ord(error.object[error.start]):04x} without its other "
            "half), which no tokenizer reads"
        ) from None
    except ValueError as error:  # a number of Python's own, or one that has thousands of digits
        raise DataError(f"{where}: {str(error).partition(';')[0]}") from None
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON, and no answer; write a number, a text or null")


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


def _table(text: str, file: Path | str, delimiter: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows below a line of names; all values are texts."""
    csv.field_size_limit(max(len(text) + 1, csv.field_size_limit()))
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = list(reader.fieldnames or ())
        if twice := {name for name in names if names.count(name) > 1}:
            raise DataError(f"{file}:1: two columns are called {', '.join(sorted(twice))}")
        line = reader.line_num + 1
        for row in reader:
            if None in row:
                raise DataError(
                    f"{file}:{line}: more fields than the {len(names)} of the first line"
                )
            yield f"{file}:{line}", row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: {error}") from None
