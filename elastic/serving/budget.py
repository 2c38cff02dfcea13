"""Which slice of a folder meets a budget on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic.config import BudgetConfig
from elastic.config.search import excess, limits_accuracy_alone
from elastic.console import say
from elastic.errors import BudgetError, ConfigError, RunError
from elastic.formats.slices import FULL
from elastic.latency.target import LATENCIES
from elastic.plain import shaped

Budget = Mapping[str, float | str] | str | float
"""Limits by the names of `BudgetConfig`, or one alone, of prefill: milliseconds, or "80%"."""
OF_TIME = (*LATENCIES, "tokens_per_second")
"""Limits that a table of latencies is for."""
_TABLE = {
    "device": str, "dtype": str, "runtime": str, "batch": int, "prompt_tokens": int,
    "new_tokens": int, "slices": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """Milliseconds of every slice on one device."""

    device: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    slices: Mapping[str, Mapping[str, float]]
    """prefill_ms and decode_ms, by slice."""

    @classmethod
    def of(cls, table: Mapping[str, Any], where: str) -> Timed:
        """RunError for something else."""
        shaped(table, _TABLE, where)
        shaped(table["slices"], {FULL: dict}, f"{where}: slices")
        for name, timed in table["slices"].items():
            shaped(timed, dict.fromkeys(LATENCIES, float), f"{where}: {name}")
        return cls(*(table[name] for name in cls.__dataclass_fields__))

    def scaled(self, measured: Mapping[str, float], device: str) -> Timed:
        """On a device where the full model takes as long as was measured, were all slices to keep
        their share of it."""
        full = self.slices[FULL]
        factors = {key: measured[key] / full[key] if full[key] else 0.0 for key in measured}
        slices = {
            name: {key: timed[key] * factor for key, factor in factors.items()}
            for name, timed in self.slices.items()
        }
        return Timed(device, self.batch, self.prompt_tokens, self.new_tokens, slices)


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
    """What the slices take on this device: as measured here, else scaled by what the full model
    takes here, which `measure` tells of a table's shape; None where no latency is limited. Shares
    of the full model's are taken as they were measured elsewhere. RunError without any table."""
    limited = [name for name in budget.limits() if name in OF_TIME]
    if not limited:
        return None
    if not tables:
        raise RunError(
            f"{where}: budget.{limited[0]}: no latency is known of these slices; search the run, "
            "and export it again"
        )
    for table in tables:
        if table.device == device:
            return table
    table = tables[0]
    if all(str(budget.limits()[name]).strip().endswith("%") for name in limited):
        say(f"Latencies in parts of the full model's are those of {table.device}")
        return table
    found = measure(table)
    say(
        f"Not known on {device}: the full model took {found['prefill_ms']:.1f} ms of prefill and "
        f"{found['decode_ms']:.1f} ms a token just now, and the slices are believed to take their "
        f"share of that as on {table.device}"
    )
    return table.scaled(found, device)


def choose(
    slices: Mapping[str, Mapping[str, Any]], timed: Timed | None, budget: BudgetConfig, where: str
) -> str:
    """The most accurate slice within the budget, of equals the cheapest; the cheapest where
    accuracy alone is limited. BudgetError names the nearest ones where there is none, RunError the
    figure that is not known."""
    known = {name: _figures(name, about, timed) for name, about in slices.items()}
    full = known.get(FULL, {})
    if missing := [name for name in _needed(budget) if name not in full]:
        raise RunError(
            f"{where}: budget.{missing[0]}: that is not known of the full model; search the run, "
            "and export it again"
        )
    limits = budget.resolved(full)
    meeting = [
        name
        for name, has in known.items()
        if all(key in has and excess(key, has[key], limit) <= 0 for key, limit in limits.items())
    ]
    if not meeting:
        raise BudgetError(_impossible(known, limits, where))
    if limits_accuracy_alone(limits):
        return min(meeting, key=lambda name: _cost(known[name]))
    return max(meeting, key=lambda name: (_accuracy(known[name]), -_cost(known[name])))


def _needed(budget: BudgetConfig) -> list[str]:
    """Names of figures that limits are held against."""
    return ["min_accuracy" if name == "max_accuracy_drop" else name for name in budget.limits()]


def _figures(name: str, about: Mapping[str, Any], timed: Timed | None) -> dict[str, float]:
    """By the names of `BudgetConfig`, as far as they are known."""
    found = {key: about[key] for key in ("params", "macs", "memory_mb") if key in about}
    if about.get("validation_estimate") is not None:
        found["min_accuracy"] = about["validation_estimate"]
    if timed and name in timed.slices:
        found |= {key: timed.slices[name][key] for key in LATENCIES}
        if found["decode_ms"]:
            found["tokens_per_second"] = 1e3 * timed.batch / found["decode_ms"]
    return found


def _accuracy(figures: Mapping[str, float]) -> float:
    """On validation examples: those of the test split choose nothing."""
    return figures.get("min_accuracy", 0.0)


def _cost(figures: Mapping[str, float]) -> float:
    return figures.get("prefill_ms", figures.get("params", 0.0))


def _impossible(
    known: Mapping[str, Mapping[str, float]], limits: Mapping[str, float], where: str
) -> str:
    def described(name: str) -> str:
        has = known[name]
        accuracy = f"{has['min_accuracy']:.1%} on validation, " if "min_accuracy" in has else ""
        speed = f"prefill {has['prefill_ms']:.1f} ms, " if "prefill_ms" in has else ""
        return f"{name} ({accuracy}{speed}{has['params'] / 1e6:.1f} M parameters)"

    wanted = ", ".join(f"{name} {limit:.4g}" for name, limit in limits.items())
    fastest = min(known, key=lambda name: _cost(known[name]))
    best = max(known, key=lambda name: _accuracy(known[name]))
    return (
        f"{where}: no slice meets the budget ({wanted}). The cheapest: {described(fastest)}. The "
        f"most accurate: {described(best)}."
    )
