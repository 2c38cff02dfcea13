"""Rows given from Python are those of a file; what cannot be used is named."""

import json
import sys

import pytest

from elastic.config import TaskConfig
from elastic.data.given import examples_of, rows_of
from elastic.data.task import Example
from elastic.errors import DataError, MissingExtra

ROWS = [{"question": f"{n} + {n}?", "answer": str(2 * n)} for n in range(3)]
BY = TaskConfig(prompt="Q: {question}")


def as_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


WAYS = {
    "dictionaries": lambda _: ROWS,
    "a generator": lambda _: (row for row in ROWS),
    "DataFrame": lambda _: pytest.importorskip("pandas").DataFrame(ROWS, index=[5, 3, 9]),
    "Dataset": lambda _: pytest.importorskip("datasets").Dataset.from_list(ROWS),
    "Table": lambda _: pytest.importorskip("pyarrow").Table.from_pylist(ROWS),
    "path": as_file,
    "name of a file": lambda folder: str(as_file(folder)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_examples(tmp_path, way):
    wanted = [Example(f"Q: {row['question']}", row["answer"]) for row in ROWS]
    made = examples_of(WAYS[way](tmp_path), BY, "train")
    assert made == wanted
    assert made[1].where == ("train: row 2" if "file" not in way and way != "path"
                             else f"{tmp_path / 'rows.jsonl'}:2")  # fmt: skip


def test_examples_stay_what_they_are():
    examples = [Example("a", "b"), Example("c", "d", ("d", "e"))]
    assert examples_of(examples, BY, "train") == examples


def test_missing_values_are_null_and_numbers_python_s():
    frame = pytest.importorskip("pandas").DataFrame({"q": ["a", None], "n": [1.5, float("nan")]})
    assert [row for _, row in rows_of(frame, "train")] == [
        {"q": "a", "n": 1.5},
        {"q": None, "n": None},
    ]
    with pytest.raises(DataError, match=r"^train: row 2: field 'n' is null"):
        examples_of(frame, TaskConfig(prompt="{n}", answer="q"), "train")


def test_numbered_classes_are_named():
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"q": datasets.Value("string"), "label": kind})
    data = datasets.Dataset.from_dict({"q": ["a", "b"], "label": [1, 0]}, features=features)
    made = examples_of(data, TaskConfig(prompt="{q}", answer="label"), "train")
    assert [example.answer for example in made] == ["yes", "no"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [], "^test: no rows; give a DataFrame"),
        (lambda: 3, "^test is a int; give a DataFrame"),
        (lambda: {"train": ROWS}, "^test is a dict with train; give"),
        (lambda: [ROWS[0], "x"], "^test: row 2 is a str; give"),
        (lambda: [ROWS[0], {"question": "x"}], "^test: row 2: field 'answer' is missing"),
        (lambda: pytest.importorskip("pandas").DataFrame({"question": [1, "a"]}),
         "^test, a DataFrame: .* column question .*; give a column one type"),
        (lambda: pytest.importorskip("pandas").DataFrame([["a", "b"]], columns=["x", "x"]),
         r"^test, a DataFrame: Duplicate column names .*\['x', 'x'\]"),
        (lambda: pytest.importorskip("pandas").DataFrame({"question": [b"\x89"], "answer": ["a"]}),
         r"^test: row 1: .*field 'question' is b'.*89'; give one text"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(make, message):
    with pytest.raises(DataError, match=message):
        examples_of(make(), BY, "test")


@pytest.mark.parametrize(
    "value",
    [
        ("a", "b"), {"a"}, float("nan"), bytearray(b"a"), ["a", None], "a\ud800",
        *(pytest.param(name, id=name) for name in ("float32", "inf32", "array", "NA", "NaT")),
    ],
)  # fmt: skip
def test_what_is_no_text_never_becomes_one(value):
    """Such as `<NA>`, `nan` or ('a', 'b'), which a model would learn."""
    numpy, pandas = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    known = {
        "float32": numpy.float32("nan"), "inf32": numpy.float32("inf"), "NA": pandas.NA,
        "array": numpy.arange(2), "NaT": pandas.NaT,
    }  # fmt: skip
    value = known.get(value, value) if isinstance(value, str) else value
    for prompt, answer in (("{x}", "y"), ("{y}", "x")):
        config = TaskConfig(prompt=prompt, answer=answer)
        with pytest.raises(DataError, match=r"^test: row 1: .*field 'x'"):
            examples_of([{"x": value, "y": "b"}], config, "test")
    options = TaskConfig(prompt="{y}", answer="y", options="x")
    with pytest.raises(DataError, match=r"^test: row 1: .*field 'x'|not among the options"):
        examples_of([{"x": ["b", value], "y": "b"}], options, "test")


def test_numbers_of_every_library_are_written_alike():
    numpy = pytest.importorskip("numpy")
    rows = [{"question": n, "answer": n} for n in (3, numpy.int64(3), numpy.float32(0.5), True)]
    made = examples_of(rows, BY, "test")
    assert [(one.prompt, one.answer) for one in made] == [
        ("Q: 3", "3"), ("Q: 3", "3"), ("Q: 0.5", "0.5"), ("Q: True", "True")
    ]  # fmt: skip


def test_without_pyarrow_a_frame_names_the_extra(monkeypatch):
    frame = pytest.importorskip("pandas").DataFrame(ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"elastic-adapters\[datasets\]"):
        examples_of(frame, BY, "train")
