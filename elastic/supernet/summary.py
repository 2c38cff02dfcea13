"""`elastic space show`: what a search space cuts of a model, without weights."""

from __future__ import annotations

import bisect
import json
from collections import Counter as Tally
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from elastic.config import SpaceShowConfig
from elastic.console import wide
from elastic.spaces.bound import BoundSpace, all_digits, readable
from elastic.supernet.cost import Cost, Counter
from elastic.supernet.discovery import bare, declared_for, require_fits

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Choices:
    """Groups of one name, in all blocks, with the same choices."""

    name: str
    dim: str
    groups: int
    choices: tuple[int, ...]


@dataclass(frozen=True)
class SpaceTable:
    """A search space on one architecture."""

    architecture: str
    space: Sequence[Choices]
    sub_adapters: int
    costs: Mapping[str, Cost]
    """Of the maximal, heuristic and minimal sub-adapter, merged."""

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sub_adapters": all_digits(self.sub_adapters)}

    def show(self) -> None:
        console = wide()
        console.print(self.architecture, highlight=False)
        for table in self.tables():
            console.print(table)
        print(json.dumps(self.as_dict()))

    def tables(self) -> list[Table]:
        from rich.table import Table

        title = f"{readable(self.sub_adapters)} sub-adapters"
        space = Table("group", "dimension", "groups", "choices", title=title)
        for row in self.space:
            space.add_row(row.name, row.dim, str(row.groups), ", ".join(map(str, row.choices)))
        columns = ["parameters", "MACs per token"]
        idle = any(cost.active_params < cost.params for cost in self.costs.values())
        if idle:  # of experts, which a token is not sent to
            columns.insert(1, "active parameters")
        costs = Table("", *columns, title="Sub-adapters once merged")
        for name, cost in self.costs.items():
            active = [f"{cost.active_params:,}"] if idle else []
            costs.add_row(name, f"{cost.params:,}", *active, short(cost.macs))
        space.columns[2].justify = "right"
        for column in costs.columns[1:]:
            column.justify = "right"
        return [space, costs]


def short(number: float | None, unit: str = "") -> str:
    """Three digits and a prefix: 13.5 GB."""
    if number is None:
        return "unknown"
    power = bisect.bisect([999.5 * 1000**k for k in range(6)], number)
    prefix = ("", *"kMGTPE")[power]
    return f"{number / 1000**power:.3g} {prefix}{unit}"


def show_space(config: SpaceShowConfig) -> SpaceTable:
    """`elastic space show`: reads no weights."""
    space = declared_for(config)
    model = bare(config.model)
    bound = space.bind(model, config.rank)
    require_fits(model, space, config.rank)
    return sizes_table(model, bound)


def sizes_table(model: PreTrainedModel, space: BoundSpace) -> SpaceTable:
    """Sizes by group."""
    counter = Counter(model, space)
    costs = {name: counter(space.named(name)) for name in ("maximal", "heuristic", "minimal")}
    kinds = Tally((g.name.rpartition(".")[2], g.dim, g.choices) for g in space)
    rows = [Choices(name, dim, n, choices) for (name, dim, choices), n in kinds.items()]
    return SpaceTable(type(model).__name__, rows, space.size, costs)


def vocabulary_told(bound: BoundSpace, least: int) -> str:
    """What is said of a vocabulary that may be cut."""
    assert bound.vocabulary is not None
    full, *fewer = bound.vocabulary.choices
    sizes = ", ".join(f"{choice:,}" for choice in fewer)
    return (
        f"Vocabulary: {least:,} of {full:,} tokens stay at every size, those of the training "
        f"answers and what ends them; to choose from: {sizes or 'nothing fewer'}"
    )
