"""The examples of a finished run, which must be those that it was trained on and judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    require_same(run, lambda _: {"splits": digest.of_texts(task)})
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

    def told(known: Mapping[str, Any]) -> dict[str, Any]:
        chat = "chat_template" in known.get("tokenizer", {})
        return {"tokenizer": digest.of_tokenizer(tokenizer, chat)}

    require_same(run, told)


def require_same(
    run: Run, told: Callable[[Mapping[str, Any]], Mapping[str, Any]], otherwise: str = ""
) -> None:
    """RunError when the run began with other digests than are `told` now, given those that it
    keeps; a run of an earlier version keeps none. `otherwise`: what else would work."""
    if not run.data.is_file():
        return
    known = read_json(run.data)
    if changed := digest.changes(known, told(known)):
        raise RunError(
            f"{run.path} began with other data: {'; '.join(changed)}; give it what it began "
            f"with{otherwise}"
        )
