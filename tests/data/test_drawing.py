"""Rows are drawn by the seed, whatever their order; a published test set stays as it is."""

import dataclasses
import json

import pytest

from elastic.config import TaskConfig
from elastic.data import load_task
from elastic.data.labels import untrained
from elastic.data.task import Example, Task, some

LABELS = ("good", "mixed", "poor")


def rows_of(name: str, count: int, prefix: str) -> list[dict]:
    """Sorted by label, as many files are."""
    labels = [LABELS[3 * n // count] for n in range(count)]
    if name == "llm_adapters":
        return [
            {"instruction": f"{prefix}{n}", "output": label, "answer": ""}
            for n, label in enumerate(labels)
        ]
    return [{"prompt": f"{prefix}{n}", "answer": label} for n, label in enumerate(labels)]


@pytest.fixture(params=["jsonl", "llm_adapters"])
def config(request, tmp_path) -> TaskConfig:
    for split, count in (("train", 300), ("test", 60)):
        lines = (json.dumps(row) for row in rows_of(request.param, count, split))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return TaskConfig(
        name=request.param, train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"),
        train_examples=60, validation_examples=30, test_examples=30,
    )  # fmt: skip


def test_a_sorted_file_gives_every_split_every_label(config):
    task = load_task(config, 0)
    for split, count in (("train", 60), ("validation", 30), ("test", 30)):
        examples = task.split(split)
        assert len(examples) == count
        counts = [sum(each.answer == label for each in examples) for label in LABELS]
        assert min(counts) > count / 9, (split, counts)
    assert untrained(task) is None
    assert load_task(config, 0) == task != load_task(config, 1)
    others = {each.text for each in load_task(config, 1).train}
    assert others != {each.text for each in task.train}


def test_a_whole_test_set_stays_in_order(config):
    whole = load_task(dataclasses.replace(config, test_examples=60), 0).test
    assert [each.where for each in whole] == [f"{config.test}:{n}" for n in range(1, 61)]


def test_of_how_many_rows_is_said_where_a_limit_draws(config):
    said = load_task(config, 0).drawn()
    assert "train 60 of 300 rows of train.jsonl" in said and "test 30 of 60 rows" in said
    whole = dataclasses.replace(config, train_examples=300, validation_examples=1, test_examples=60)
    assert "test" not in load_task(whole, 0).drawn()


def test_answers_that_are_asked_and_never_trained_are_told(config):
    task = load_task(dataclasses.replace(config, draw="position"), 0)
    said = untrained(task)
    assert "30 of the 30 validation examples have the answers 'poor'" in said
    free = [Example(str(n), f"text {n}") for n in range(40)]
    assert untrained(Task(free, [Example("a", "new")], free)) is None, "no closed set"


def test_some_are_drawn_from_all_in_their_order():
    numbers = [Example(str(n), "a") for n in range(100)]
    found = [int(each.prompt) for each in some(numbers, 10)]
    assert len(found) == 10 and found == sorted(found) and found[-1] > 50
    assert some(numbers, 100) is numbers and some(numbers, None) is numbers
