"""Factors as the base model has its channels, for whoever puts them beside untouched weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from elastic.supernet.supernet import Supernet


@torch.no_grad()
def factors_of_base(net: Supernet) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Site, A and B of every target at its active rank, without the scale: (rank, in) and
    (out, rank) of a linear layer, (experts, rank, in) and (experts, out, rank) of a matrix of all
    experts. No channels, experts or blocks may be cut."""
    moved = net.permutations()
    for site, adapter in net.adapters():
        A, B = adapter.unscaled(net.layer(site).size.rank)
        if mixture := net.space.experts_of(site):
            factors = net.mixtures[mixture.experts].experts.factors[site.rpartition(".")[2]]
            A, B = factors.of_base(A, B, *net.expert_orders(mixture.experts))
        if (site, "in") in moved:
            A = A[:, torch.argsort(moved[site, "in"])]
        if (site, "out") in moved:
            B = B[torch.argsort(moved[site, "out"])]
        yield site, A, B
