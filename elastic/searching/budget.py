"""The budget: how far figures are past its limits, and refusing what nobody can meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from elastic.config import BudgetConfig, SearchConfig, TrainConfig
from elastic.config.search import excess
from elastic.errors import BudgetError, ConfigError
from elastic.models import loading
from elastic.run import Run
from elastic.searching.objective import Figures, Objective
from elastic.spaces.bound import Candidate
from elastic.supernet.cost import Counter

DECODING = ("decode_ms", "tokens_per_second")


class Limited(Protocol):
    """What a budget is held against."""

    def budget_values(self) -> Mapping[str, float]:
        """By the names of its limits."""


def violations(figures: Limited, limits: Mapping[str, float]) -> dict[str, float]:
    """Amount past each limit; at most 0 is met (Optuna's sign)."""
    values = figures.budget_values()
    return {name: excess(name, values[name], limit) for name, limit in limits.items()}


def met(figures: Limited, limits: Mapping[str, float]) -> bool:
    """Whether every limit holds."""
    return all(amount <= 0 for amount in violations(figures, limits).values())


def room(limits: Mapping[str, float], objective: Objective) -> float | None:
    """All limits on costs as one: the part of the way from the minimal to the full model at which
    the tightest would be met if all costs shrank alike. None without limits."""
    parts, limits = [], dict(limits)
    full = objective.costs(objective.space.maximal())
    small = objective.smallest()
    least = {name: min(each[name] for each in small) for name in full}
    if "tokens_per_second" in limits:
        slowest = 1000 * objective.config.timing.batch / limits.pop("tokens_per_second")
        limits["decode_ms"] = min(slowest, limits.get("decode_ms", slowest))
    for name, limit in limits.items():
        if name in full and full[name] != least[name]:
            parts.append((limit - least[name]) / (full[name] - least[name]))
    return min(parts, default=None)


def refuse_decoding(config: SearchConfig) -> None:
    """ConfigError for what nothing of a model that decodes nothing could be held against."""
    asked = [f"budget.{name}" for name in config.budget.limits() if name in DECODING]
    asked += [f"objectives {name}" for name in config.objectives if name in DECODING]
    if asked:
        raise ConfigError(
            f"{asked[0]}: nothing is decoded here (a classifier, or timing.new_tokens 0); choose "
            "prefill_ms, the time for one batch"
        )


def refuse_by_counting(run: Run, budget: BudgetConfig, trained: TrainConfig) -> None:
    """BudgetError when params or macs cannot be met, from the architecture alone."""
    exact = {name for name in ("params", "macs") if name in budget.limits()}
    if not exact:
        return
    model = loading.skeleton(trained.model)
    space = run.space().bind(model, trained.adapter.rank)
    counter = Counter(model, space)
    least, full = space.minimal(), counter.full
    # A head of all tokens may be the embeddings, too.
    both = [counter(least), counter(space.with_whole_vocabulary(least))]
    others = dict.fromkeys(budget.limits(), 0.0) | {"min_accuracy": 0.0}
    limits = budget.resolved({**others, "params": full.params, "macs": full.macs})
    for name in exact:
        smallest = min(getattr(each, name) for each in both)
        if smallest > limits[name]:
            raise BudgetError(
                f"budget.{name} {limits[name]:.4g} is below the minimal sub-adapter's "
                f"{smallest:.4g} (the full model has {getattr(full, name):.4g}); "
                "raise it, or train a space with smaller choices"
            )


def refuse_by_extremes(
    results: Mapping[Candidate, Figures], objective: Objective, limits: Mapping[str, float]
) -> None:
    """BudgetError as soon as both extremes are known and even the smallest ones, at any precision,
    are over the budget."""
    space = objective.space
    if not {space.minimal(), space.maximal()} <= results.keys():
        return
    for costs in objective.smallest():
        figures = replace(results[space.minimal()], **costs)
        over = violations(figures, limits).items()
        if not any(name != "min_accuracy" and past > 0.1 * limits[name] for name, past in over):
            return
    raise BudgetError(impossible(limits, results))


def impossible(limits: Mapping[str, float], results: Mapping[Candidate, Figures]) -> str:
    """Names the nearest ones on both sides."""

    def described(figures: Figures) -> str:
        return (
            f"{figures.accuracy:.1%} on validation, prefill {figures.prefill_ms:.1f} ms, "
            f"decode {figures.decode_ms:.1f} ms, {figures.params / 1e6:.1f} M parameters"
        )

    wanted = ", ".join(f"{name} {limit:.4g}" for name, limit in limits.items())
    fastest = min(results.values(), key=lambda figures: figures.prefill_ms)
    best = max(results.values(), key=lambda figures: figures.accuracy)
    return (
        f"no sub-adapter meets the budget ({wanted}). The fastest: {described(fastest)}. "
        f"The most accurate: {described(best)}."
    )
