"""A super-adapter of any method as one of plain LoRA: the same update at every rank, to the bit,
for readers that know no methods.

Methods nest (`elastic.adapters.base.Adapter.unscaled`), so the factors of the largest rank have
those of all ranks in them. Ranks are counted as a plain LoRA counts them: SORSA has twice as many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elastic.config import AdapterConfig
from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.supernet.supernet import Supernet


@dataclass(frozen=True)
class AsLora:
    """What of a supernet is said otherwise."""

    adapter: AdapterConfig
    declared: SearchSpace
    factors: dict[str, Tensor]
    """By `site.A` (factor rank, in) and `site.B` (out, factor rank), the scale in B; a classifier's
    head as it is."""
    rank_of: Callable[[int], int]
    """How many ranks a plain LoRA has for so many of the method's."""

    def sub_adapter(self, net: Supernet, sub: SubAdapter) -> SubAdapter:
        """This one of the supernet in ranks of the space here; 0 where a block is left out."""
        ranks = {group.name for group in net.space if group.dim == "rank"}
        return SubAdapter(
            tuple(
                (name, self.rank_of(choice) if name in ranks and choice else choice)
                for name, choice in sub.choices
            )
        )


@torch.no_grad()
def as_lora(net: Supernet) -> AsLora:
    """Of the factors that the supernet has now."""
    adapters = dict(net.adapters())
    some = next(iter(adapters.values()))
    ranks = {rank: len(some.factors(rank)[0]) for rank in _ranks(net)}
    factors = {name: head.detach() for name, head in net.head.items()}
    for site, adapter in adapters.items():
        A, B = adapter.factors(adapter.max_rank)
        factors |= {f"{site}.A": A.detach(), f"{site}.B": B.detach()}
    most = ranks[net.adapter.rank]
    config = AdapterConfig(method="lora", rank=most, alpha=float(most))
    return AsLora(config, _in_ranks(net, ranks), factors, ranks.__getitem__)


def _ranks(net: Supernet) -> set[int]:
    """All that some layer can have."""
    chosen = {choice for group in net.space if group.dim == "rank" for choice in group.choices}
    return chosen | {net.adapter.rank}


def _in_ranks(net: Supernet, ranks: dict[int, int]) -> SearchSpace:
    """The declared space with these ranks for its own."""
    sections = (
        replace(
            section,
            groups=tuple(
                spec
                if spec.dim != "rank"
                else replace(
                    spec,
                    choices=tuple(ranks[c] for c in spec.resolve(net.adapter.rank, spec.name)),
                    align=1,
                )
                for spec in section.groups
            ),
        )
        for section in net.declared.sections
    )
    return SearchSpace(tuple(sections), net.declared.source)
