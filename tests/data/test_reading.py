"""One table in every form that is read; what is not read is named, with the way out."""

import csv
import gzip
import json

import pytest

from elastic.config import TaskConfig
from elastic.data.reading import read_json, read_rows, read_text
from elastic.data.rows import example_of
from elastic.errors import DataError, DataMissing

ROWS = [{"prompt": f'q{n}, "said"\nhe', "answer": f"é{n}"} for n in range(3)]


def as_lines() -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def as_table(file, delimiter: str) -> None:
    with open(file, "w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, list(ROWS[0]), delimiter=delimiter)
        table.writeheader()
        table.writerows(ROWS)


def table():
    return pytest.importorskip("pyarrow").Table.from_pylist(ROWS)


def as_arrow(file, form: str) -> None:
    """`new_file` is Feather too, `new_stream` what `datasets` keeps."""
    ipc = pytest.importorskip("pyarrow.ipc")
    with getattr(ipc, form)(str(file), table().schema) as out:
        out.write_table(table())


WRITE = {
    "jsonl": lambda file: file.write_text(as_lines()),
    "json": lambda file: file.write_text(json.dumps(ROWS, indent=1)),
    "csv": lambda file: as_table(file, ","),
    "tsv": lambda file: as_table(file, "\t"),
    "parquet": lambda file: pytest.importorskip("pyarrow.parquet").write_table(table(), file),
    "feather": lambda file: pytest.importorskip("pyarrow.feather").write_feather(table(), file),
    "arrow": lambda file: as_arrow(file, "new_file"),
    "stream": lambda file: as_arrow(file, "new_stream"),
}


@pytest.mark.parametrize("form", WRITE)
@pytest.mark.parametrize("packed", [False, True])
def test_every_form_holds_the_same_rows(tmp_path, form, packed):
    file = tmp_path / f"rows.{form}"
    WRITE[form](file)
    if packed:
        file = file.with_suffix(f".{form}.gz")
        file.write_bytes(gzip.compress((tmp_path / f"rows.{form}").read_bytes()))
    assert [row for _, row in read_rows(file)] == ROWS


@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_a_mark_before_the_text_is_read_over(tmp_path, form):
    file = tmp_path / f"rows.{form}"
    WRITE[form](file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [row for _, row in read_rows(file)] == ROWS


def test_rows_of_a_table_stand_where_they_begin(tmp_path):
    as_table(tmp_path / "rows.csv", ",")  # each of two lines
    assert [where.rpartition(":")[2] for where, _ in read_rows(tmp_path / "rows.csv")] == [
        "2", "4", "6",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (as_lines().encode("utf-16"), "UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8"),
        (as_lines().encode("utf-16-le"), r"zero: UTF-16LE without its mark.*-f UTF-16LE"),
        (b'{"a": "b"}\n{"a": "caf\xe9"}', r":2: not UTF-8 text \(byte 0xe9\), perhaps Latin-1"),
        (b"BZh91AY", "compressed with bzip2; unpack it"),
        (b"\x1f\x8b\x08nothing", "broken gzip"),
        (b"PAR1 and no more", "broken Parquet"),
        (b"ARROW1 and no more", "broken Arrow"),
        (b"\xff\xff\xff\xff\x10\0\0\0 and no more", "broken Arrow"),
        (b"FEA1 and no more", "Feather of version 1; write it anew"),
    ],
)
def test_other_encodings_are_named(tmp_path, content, message):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"rows\.jsonl.*{message}"):
        read_rows(file)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("NaN", "NaN is no JSON"),
        ("-Infinity", "-Infinity is no JSON"),
        ("1e400", "the number 1e400 is too large"),
        ("9" * 5000, "digits"),
        ('"\\ud800"', r"half a character \(\\ud800 without its other half\)"),
        ("[" * 200_000, "nested too deep"),
    ],
    ids=["nan", "infinity", "1e400", "digits", "surrogate", "nested"],
)
def test_what_no_text_or_number_is_is_named_by_its_line(tmp_path, value, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"a": 1}}\n{{"a": {value}}}\n')
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{message}"):
        read_rows(file)


def test_both_halves_of_a_character_are_one(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": "\\ud83d\\ude00"}')
    assert read_rows(file)[0][1] == {"a": "\U0001f600"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2,3\n", ":2: more fields than the 2 of the first line"),
        ("a,a\n1,2\n", ":1: two columns are called a"),
        ("a,b\n", ": no rows"),
        ('a,b\n"1,2\n', "unexpected end of data"),
    ],
)
def test_a_broken_table_is_named(tmp_path, text, message):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "rows.csv")


def test_what_is_no_file_is_missing(tmp_path):
    for read in (read_rows, read_json, read_text):
        for path in (tmp_path, tmp_path / "none", tmp_path / "none" / "deeper"):
            with pytest.raises(DataMissing, match="no such data file"):
                read(path)


def test_two_columns_of_one_name_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    twice = pyarrow.table([["x"], ["y"]], names=["a", "a"])
    pytest.importorskip("pyarrow.feather").write_feather(twice, tmp_path / "rows.arrow")
    with pytest.raises(DataError, match=r"rows\.arrow: two columns are called a"):
        read_rows(tmp_path / "rows.arrow")


def test_a_column_of_bytes_is_named_with_its_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    rows = pyarrow.table({"prompt": [b"\x89PNG"], "answer": ["a"]})
    pytest.importorskip("pyarrow.feather").write_feather(rows, tmp_path / "rows.arrow")
    [(where, row)] = read_rows(tmp_path / "rows.arrow")
    with pytest.raises(DataError, match=r"rows\.arrow: row 1: .*field 'prompt' is b'.*PNG'; give"):
        example_of(row, TaskConfig(), where)
