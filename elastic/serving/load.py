"""A folder of every size (`elastic export --formats elastic`) as one plain model of the size that
is wanted here, or several on one base."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.config import TimingConfig
from elastic.console import say
from elastic.errors import BaseMismatch, ConfigError
from elastic.formats import slices
from elastic.formats.choosing import FULL, LATENCIES, best_of, tables_of
from elastic.latency.measure import REFERENCE, clock_of, measure
from elastic.latency.runtime import timed_runner
from elastic.models import loading
from elastic.provenance import provenance
from elastic.serving.budget import Budget, Timed, as_budget, as_timed, choose, timed_here
from elastic.serving.resizable import resizable as resizable_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDS = 5
"""In which the full model is timed where nothing is known of a device."""


def load(
    folder: Path | str | Mapping[str, Path | str],
    *,
    slice: str | None = None,
    budget: Budget | None = None,
    resizable: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    base: Path | str | None = None,
) -> PreTrainedModel:
    """A transformers model of one size, merged, in the type that it is stored in.

        elastic.load("runs/mine/export/best/elastic", budget={"prefill_ms": 25})
        elastic.load("runs/mine/export/best/elastic", budget="80%")
        elastic.load("runs/mine/export/best/elastic", slice="front-3")

    A budget is met by the most accurate slice that meets it on this device, by the table in the
    folder. A device that the table does not know is measured for some seconds first, at full size.
    Without either, what the search chose. A `resizable` model has one copy of all weights, and
    `model.resize("front-2")` or `with model.at({"prefill_ms": 25}):` change its size between calls.

    Folders of several tasks on the same base model, by name, are one resizable model with one copy
    of the base: `model.adapters["sst2"].resize("front-2")`, or `.at(...)`, makes that task's the
    active one.

    `base` says where the base model is, of a folder that refers to it, if it is no longer where it
    was. BudgetError where nothing meets the budget, RunError for a slice that there is not, or a
    damaged folder, BaseMismatch for another base, ConfigError for no budget, or a slice beside it.
    """
    if slice is not None and budget is not None:
        raise ConfigError("elastic.load: slice and budget: the one or the other names the size")
    several = folder if isinstance(folder, Mapping) else {"": folder}
    if not several:
        raise ConfigError("elastic.load: no folder was given")
    here = str(loading.usable_device(device))
    place = None if base is None else str(base)
    folders = {
        task: Folder(Path(path), here, trust_remote_code, place) for task, path in several.items()
    }
    chosen = {task: (one, one.named(slice, budget)) for task, one in folders.items()}
    [first, *others] = folders.values()
    for other in others:
        _require_same_base(first, other)
    if resizable or others or isinstance(folder, Mapping):
        config = first.base.config
        return resizable_of(loading.load_model(config.path, config), chosen)
    return first.slice(chosen[""][1])


@dataclass(frozen=True)
class Folder:
    """One folder, on this device."""

    path: Path
    device: str
    trust_remote_code: bool
    place: str | None
    """Of its base, as it was given."""

    @functools.cached_property
    def index(self) -> dict[str, Any]:
        return slices.read(self.path)

    @functools.cached_property
    def base(self) -> slices.Base:
        """Compared with what the folder says of it."""
        return slices.base_of(
            self.path, self.index, trust_remote_code=self.trust_remote_code, device=self.device,
            base=self.place,
        )  # fmt: skip

    def slice(self, name: str) -> PreTrainedModel:
        """A plain model of this size."""
        return slices.load(
            self.path, name, device=self.device, trust_remote_code=self.trust_remote_code,
            base=self.place,
        )  # fmt: skip

    def named(self, slice: str | None, budget: Budget | None) -> str:
        """The name of the slice that is asked for, which there is."""
        if slice is None:
            slice = best_of(self.index) if budget is None else self.within(budget)
            say(f"{self.path}: {slice}")
        slices.about_of(self.path, self.index, slice)
        return slice

    def within(self, budget: Budget) -> str:
        """The name of the slice that meets the budget here."""
        limits, where = as_budget(budget), str(self.path)
        file = self.path / slices.INDEX
        tables = [as_timed(table, f"{file}: latencies") for table in tables_of(self.index)]
        known = provenance(self.device)["device"]
        timed = timed_here(tables, limits, known, self._measured, where)
        return choose(self.index["slices"], timed, limits, where)

    def _measured(self, table: Timed) -> dict[str, float]:
        """Milliseconds of the full size."""
        timing = TimingConfig(
            batch=table.batch, prompt_tokens=table.prompt_tokens, new_tokens=table.new_tokens,
            rounds=ROUNDS, max_rounds=2 * ROUNDS,
        )  # fmt: skip
        model = self.slice(FULL)
        found = measure(
            {REFERENCE: timed_runner(model, timing)}, timing,
            vocabulary=model.config.get_text_config().vocab_size,
            clock=clock_of(model.device),
        ).full  # fmt: skip
        return {key: getattr(found, key) for key in LATENCIES}


def _require_same_base(first: Folder, other: Folder) -> None:
    """BaseMismatch unless both folders have the same base model, in the same form."""
    bases = [
        (one.base.digest, one.base.is_ordered, *(one.index[key] for key in ("dtype", "head")))
        for one in (first, other)
    ]
    if bases[0] != bases[1]:
        raise BaseMismatch(
            f"{first.path} and {other.path} have no base model in common: {bases[0][0]} "
            f"({first.index['dtype']}) and {bases[1][0]} ({other.index['dtype']}). Export both "
            "with --slices.base reference from runs on the same base: copies are the same only "
            "where channels stand in the same order"
        )
