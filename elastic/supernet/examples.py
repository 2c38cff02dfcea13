"""The examples of a finished run, which must be those that it was trained on and judged by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastic.data import Task, digest, load_task
from elastic.errors import RunError
from elastic.files import read_json
from elastic.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def task_of(run: Run) -> Task:
    """The examples of a run; RunError where they are not what it began with (a run of an earlier
    version does not know), DataMissing where they are not there."""
    trained = run.config()
    task = load_task(trained.task, trained.seed)
    if run.data.is_file():
        _require(run, digest.changes(read_json(run.data), {"splits": digest.of_texts(task)}))
    return task


def require_tokenizer(run: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    """RunError where the tokenizer is not that of the run."""
    if run.data.is_file():
        now = {"tokenizer": digest.of_tokenizer(tokenizer)}
        _require(run, digest.changes(read_json(run.data), now))


def _require(run: Run, changed: list[str]) -> None:
    if changed:
        raise RunError(
            f"{run.path} began with other data: {'; '.join(changed)}; give it what it began with"
        )
