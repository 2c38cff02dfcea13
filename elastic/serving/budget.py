"""Which slice of a folder meets a budget on this machine: `elastic.formats.choosing`, of what was
checked, with the errors of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from elastic.config import BudgetConfig
from elastic.console import say
from elastic.errors import BudgetError, ConfigError, RunError
from elastic.formats import choosing
from elastic.formats.choosing import FULL, LATENCIES, Timed
from elastic.plain import shaped

Budget = Mapping[str, float | str] | str | float
"""Limits by the names of `BudgetConfig`, or one alone, of prefill: milliseconds, or "80%"."""
_TABLE = {
    "device": str, "dtype": str, "runtime": str, "batch": int, "prompt_tokens": int,
    "new_tokens": int, "slices": dict,
}  # fmt: skip


def as_timed(table: Mapping[str, Any], where: str) -> Timed:
    """A table of the folder; RunError for something else."""
    shaped(table, _TABLE, where)
    shaped(table["slices"], {FULL: dict}, f"{where}: slices")
    for name, timed in table["slices"].items():
        shaped(timed, dict.fromkeys(LATENCIES, float), f"{where}: {name}")
    return Timed(*(table[name] for name in Timed.__dataclass_fields__))


def as_budget(budget: Budget) -> BudgetConfig:
    """ConfigError for a limit that there is not, or of an impossible value."""
    limits = dict(budget) if isinstance(budget, Mapping) else {"prefill_ms": budget}
    if strange := sorted(set(limits) - set(BudgetConfig.__dataclass_fields__)):
        known = ", ".join(BudgetConfig.__dataclass_fields__)
        raise ConfigError(f"budget: {strange[0]} is no limit; choose from {known}")
    return BudgetConfig(**limits)


def timed_here(
    tables: Sequence[Timed],
    budget: BudgetConfig,
    device: str,
    measure: Callable[[Timed], Mapping[str, float]],
    where: str,
) -> Timed | None:
    """What the slices take on this device, measured or scaled, where a latency is limited;
    RunError without any table."""
    with _as_ours():
        return choosing.timed_here(tables, budget.limits(), device, measure, where, say)


def choose(
    slices: Mapping[str, Mapping[str, Any]], timed: Timed | None, budget: BudgetConfig, where: str
) -> str:
    """The name of the slice; BudgetError names the nearest ones where there is none, RunError the
    figure that is not known."""
    with _as_ours():
        return choosing.choose(slices, timed, budget.limits(), where)


@contextlib.contextmanager
def _as_ours() -> Iterator[None]:
    try:
        yield
    except choosing.NotMet as error:
        raise BudgetError(str(error)) from None
    except choosing.NotKnown as error:
        raise RunError(str(error)) from None
