"""Rows given from Python are kept in the run, which is then one like any other."""

from dataclasses import replace

import pytest
import torch

import elastic
from elastic.config import TaskConfig
from elastic.errors import ConfigError, DataError, RunError
from elastic.run import Run
from elastic.training.rows import kept
from tests.helpers.tiny_runs import factors, train_config

BY = TaskConfig(prompt="{q}", answer="a", validation_examples=4)


def rows(split: str, count: int = 8) -> list[dict]:
    return [{"q": f"{split} {n}", "a": n} for n in range(count)]


def given() -> dict:
    pandas = pytest.importorskip("pandas")
    return {"train": pandas.DataFrame(rows("train", 16)), "test": rows("test")}


@pytest.fixture
def config(tiny_folder, tmp_path):
    return train_config(tiny_folder, tmp_path / "run", task=BY, max_steps=1)


def test_a_run_on_given_rows_is_one_on_files(config, tmp_path):
    run = elastic.train(config, data=given())
    files = {split: str(Run(config.run).rows / f"{split}.jsonl") for split in ("train", "test")}
    task = replace(BY, name="jsonl", **files)
    again = elastic.train(replace(config, run=str(tmp_path / "again"), task=task))
    torch.testing.assert_close(factors(run), factors(again), rtol=0, atol=0)
    assert run.config().task == task
    before = (run.super_adapter / "factors.safetensors").stat().st_mtime_ns
    elastic.train(config, data=given())
    assert (run.super_adapter / "factors.safetensors").stat().st_mtime_ns == before


def test_other_rows_are_refused_and_the_old_ones_stay(config):
    known = kept(config, given())
    Run(config.run).begin(known)
    assert known.task.name == "jsonl" and known.task.validation is None
    text = (Run(config.run).rows / "test.jsonl").read_text()
    with pytest.raises(RunError, match=r"began with other test rows .*test\.jsonl"):
        kept(config, {**given(), "test": rows("other")})
    assert (Run(config.run).rows / "test.jsonl").read_text() == text


def test_rows_that_nothing_began_with_may_be_corrected(config):
    """What is refused of them is found once they stand there."""
    task = replace(BY, options="o")
    wrong = {split: [{**row, "o": ["x"]} for row in rows(split)] for split in ("train", "test")}
    with pytest.raises(DataError, match="not among the options"):
        elastic.train(replace(config, task=task), data=wrong)
    right = {split: [{**row, "o": [row["a"], "x"]} for row in rows(split)] for split in wrong}
    kept(replace(config, task=task), right)
    text = (Run(config.run).rows / "train.jsonl").read_text()
    assert '"o": [7, "x"]' in text


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"train": rows("a")}, ConfigError, "^data: no test rows; give train and test"),
        ({"trian": rows("a")}, ConfigError, "unknown split 'trian'; did you mean 'train'"),
        ({"train": [{"q": "a", "a": object()}], "test": rows("b")}, DataError,
         "^train: row 1: field 'a' is object .*; give a text"),
        ({"train": rows("a"), "test": [{"q": "a", "a": float("nan")}]}, DataError,
         "^test: row 1: field 'a' is float nan; give a text"),
        ({"train": rows("a"), "test": [{"q": "a", "a": "\ud800"}]}, DataError,
         r"^test: row 1: field 'a' is str '\\ud800'; give a text"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_named_and_nothing_is_written(config, data, error, message):
    with pytest.raises(error, match=message):
        elastic.train(config, data=data)
    assert not Run(config.run).path.exists()


def test_another_run_is_left_as_it_is(config):
    run = Run(config.run)
    run.begin(replace(config, seed=3))
    with pytest.raises(RunError, match=r"holds another run, which differs in .*seed"):
        elastic.train(config, data=given())
    assert not run.rows.exists()


def test_rows_and_a_sequence_of_tasks_do_not_go_together(config):
    with pytest.raises(ConfigError, match="leave out tasks and dry_run"):
        elastic.train(replace(config, dry_run=True), data=given())
