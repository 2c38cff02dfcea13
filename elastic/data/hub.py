"""Examples from a Hugging Face data set, by its name on the hub or from a folder."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.config import TaskConfig
from elastic.console import say
from elastic.data.rows import example_of
from elastic.data.task import Example, Split, Task, disjoint, limits
from elastic.errors import DataError, DataMissing, MissingExtra

if TYPE_CHECKING:
    from datasets import Dataset


def load(config: TaskConfig, seed: int) -> Task:
    """Rows of each split, shuffled by the seed, for many sets are sorted by label; without a
    validation split the end of the training split is held out. Code of the data set is not run."""
    names: dict[Split, str | None] = {
        "train": config.train or "train", "validation": config.validation,
        "test": config.test or "test",
    }  # fmt: skip
    read, rows = {}, {}
    for split, name in names.items():
        if name is not None:
            read[split], rows[split] = _read(config, name, split, seed)
    rows.setdefault("validation", rows["train"])
    where = {split: f"{config.dataset}, split {name or names['train']}"
             for split, name in names.items()}  # fmt: skip
    return disjoint(read["train"], read.get("validation"), read["test"], config, where, rows)


def _read(config: TaskConfig, name: str, split: Split, seed: int) -> tuple[Sequence[Example], int]:
    """As many examples as may be wanted, and how many rows there are."""
    rows = _open(config, name)
    order = list(range(len(rows)))
    random.Random(f"{seed}/{split}").shuffle(order)
    # Enough of them even if every one of the other splits stands here too.
    order = order[: 2 * sum(limits(config).values())]
    where, classes = f"{config.dataset}, split {name}: row", classes_of_columns(rows.features)
    examples, secret = [], 0
    for number, row in zip(order, rows.select(order), strict=True):
        if row.get(config.answer) == -1 and config.answer in classes:
            secret += 1
            continue
        examples.append(example_of(named(row, classes), config, f"{where} {number}"))
    if not examples and secret:
        raise DataError(
            f"{config.dataset}, split {name}: no row has an answer (GLUE keeps those of its test "
            "splits secret); test on another split, such as validation"
        )
    if secret:
        say(f"{config.dataset}, split {name}: {secret} rows without an answer are left out")
    return examples, len(rows)


def _open(config: TaskConfig, name: str) -> Dataset:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "datasets", "task.name datasets") from error

    what = f"task.dataset {config.dataset}" + (f", subset {config.subset}" if config.subset else "")
    assert config.dataset is not None
    folder = Path(config.dataset).expanduser()
    datasets.disable_progress_bars()
    try:
        if (folder / "dataset_dict.json").is_file():  # as `save_to_disk` writes them
            found = datasets.load_from_disk(str(folder))
        else:
            path = str(folder) if folder.exists() else config.dataset
            found = datasets.load_dataset(path, config.subset)
    except Exception as error:  # the library raises many kinds; all mean: not to be had
        raise DataMissing(f"{what}: {' '.join(str(error).split())[:300]}") from None
    finally:
        datasets.enable_progress_bars()
    if name not in found:
        raise DataError(f"{what} has no split {name!r}; it has {', '.join(found)}")
    return found[name]


def classes_of_columns(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of classes, by column, where the set numbers them: what has a type of its own
    (`datasets.ClassLabel`) knows them as `names`."""
    return {c: f.names for c, f in features.items() if type(f).__name__ == "ClassLabel"}


def named(row: Mapping[str, Any], classes: Mapping[str, list[str]]) -> dict[str, Any]:
    """The row with the names of its classes; a class that is not told (-1) stays a number."""
    names = {
        column: known[row[column]]
        for column, known in classes.items()
        if row.get(column) is not None and row[column] >= 0
    }
    return {**row, **names}
