"""A folder of every size (`elastic export --formats elastic`) as one plain model of the size that
is wanted here."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.config import TimingConfig
from elastic.console import say
from elastic.errors import ConfigError
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
    folder: Path | str,
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
    `base` says where the base model is, of a folder that refers to it, if it is no longer where it
    was. BudgetError where nothing meets the budget, RunError for a slice that there is not, or a
    damaged folder, BaseMismatch for another base, ConfigError for no budget, or a slice beside it.
    """
    if slice is not None and budget is not None:
        raise ConfigError("elastic.load: slice and budget: the one or the other names the size")
    folder, here = Path(folder), str(loading.resolve_device(device))
    index = slices.read(folder)
    place = None if base is None else str(base)
    settings: dict[str, Any] = {"trust_remote_code": trust_remote_code, "base": place}
    within = functools.partial(_within, folder, index, here, settings)
    if slice is None:
        slice = best_of(index) if budget is None else within(budget)
        say(f"{folder}: {slice}")
    slices.about_of(folder, index, slice)
    if resizable:
        return resizable_of(folder, slice, within, device=here, **settings)
    return slices.load(folder, slice, device=here, **settings)


def _within(
    folder: Path, index: Mapping[str, Any], device: str, settings: Mapping[str, Any], budget: Budget
) -> str:
    """The name of the slice that meets the budget here; `settings` are those of loading."""
    limits, where = as_budget(budget), str(folder)
    file = folder / slices.INDEX
    tables = [as_timed(table, f"{file}: latencies") for table in tables_of(index)]

    def measured(table: Timed) -> dict[str, float]:
        timing = TimingConfig(
            batch=table.batch, prompt_tokens=table.prompt_tokens, new_tokens=table.new_tokens,
            rounds=ROUNDS, max_rounds=2 * ROUNDS,
        )  # fmt: skip
        model = slices.load(folder, FULL, device=device, **settings)
        found = measure(
            {REFERENCE: timed_runner(model, timing)}, timing,
            vocabulary=model.config.vocab_size, clock=clock_of(model.device),
        ).full  # fmt: skip
        return {key: getattr(found, key) for key in LATENCIES}

    known = provenance(device)["device"]
    timed = timed_here(tables, limits, known, measured, where)
    return choose(index["slices"], timed, limits, where)
