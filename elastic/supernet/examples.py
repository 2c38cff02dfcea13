"""The examples of a finished run, which must be those that it was trained on and judged by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from elastic.data import Task, digest, load_task
from elastic.errors import RunError
from elastic.files import read_json
from elastic.models import loading
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


def digests_of(run: Run) -> dict[str, Any]:
    """Of its data, as the run keeps them; of an earlier version's those of its data as they are."""
    if run.data.is_file():
        return read_json(run.data)
    task = task_of(run)
    tokenizer = loading.load_tokenizer(run.config().model)
    return {
        "splits": digest.of_texts(task),
        "tokenizer": digest.of_tokenizer(tokenizer, task.has_chat),
    }


def require_tokenizer(run: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    """RunError where the tokenizer is not that of the run."""
    if run.data.is_file():
        known = read_json(run.data)
        chat = "chat_template" in known.get("tokenizer", {})
        _require(run, digest.changes(known, {"tokenizer": digest.of_tokenizer(tokenizer, chat)}))


def _require(run: Run, changed: list[str]) -> None:
    if changed:
        raise RunError(
            f"{run.path} began with other data: {'; '.join(changed)}; give it what it began with"
        )
