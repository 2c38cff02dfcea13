"""What cut channels would have said, predicted from the kept ones and folded into their weights.

A layer W whose input x is cut to the channels K loses W[:, C] x[C] of the others, C. The
least-squares prediction of x[C] from x[K] is linear,

    x[C] ~ S x[K],    S = G[C, K] (G[K, K] + λ I)⁻¹,    λ = ridge · mean(diag G),

with G = E[x xᵀ] over calibration tokens, so that W[:, K] + t W[:, C] S makes up for a part t of
what is lost, and costs nothing once it is formed. A degree t of 1 is the ridge regression itself,
as in OSSCAR (Meng et al. 2024, arXiv 2403.12983). A smaller one is better where the kept channels
have been trained to do without the others.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elastic.spaces.dims import common
from elastic.spaces.mixtures import EXPERT_WIDTH
from elastic.supernet.routed import widths_of

if TYPE_CHECKING:
    from elastic.spaces.bound import BoundSpace
    from elastic.spaces.dims import Ranges

RIDGE = 0.01
HALF = 0.5
"""The degree where nothing decides: within noise of the best at every width that was tried."""
ROOM = 1e9
"""Bytes of solutions that are remembered."""


class Compensation:
    """Solutions S for the layers of one supernet, solved when first asked for.

    Those asked for last are remembered as far as there is `room`, in bytes; the others are solved
    again.
    """

    def __init__(
        self,
        moments: Mapping[str, Tensor],
        ridge: float = RIDGE,
        room: float = ROOM,
        device: torch.device | str = "cpu",
    ) -> None:
        """`device` is where is solved."""
        self.moments, self.ridge, self.room, self.device = moments, ridge, room, device
        self._solved: OrderedDict[tuple[str, Ranges], Tensor] = OrderedDict()
        self._held = 0

    def __call__(self, site: str, left: Ranges) -> Tensor | None:
        """S (cut channels, kept channels), float32, where these (start, length) of a layer's input
        are left; None for a layer whose moments are not known."""
        if site not in self.moments:
            return None
        key = site, left
        if key not in self._solved:
            self._remember(key, solution(self.moments[site].to(self.device), left, self.ridge))
        self._solved.move_to_end(key)
        return self._solved[key]

    def _remember(self, key: tuple[str, Ranges], solved: Tensor) -> None:
        self._solved[key] = solved
        self._held += solved.nbytes
        while self._held > self.room and len(self._solved) > 1:
            _, oldest = self._solved.popitem(last=False)
            self._held -= oldest.nbytes


def solution(moment: Tensor, left: Ranges, ridge: float) -> Tensor:
    """S (cut, kept) for one layer, solved in float64; zero where nothing but zeros was seen.

    Where rounding makes a moment with a small ridge indefinite, the ridge grows until it is not.
    """
    stays = torch.zeros(len(moment), dtype=torch.bool, device=moment.device)
    for start, length in left:
        stays[start : start + length] = True
    kept, cut = stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]
    damping = ridge * float(moment.diagonal().mean())
    if damping <= 0:
        return torch.zeros(len(cut), len(kept), device=moment.device)
    among, across = moment[kept][:, kept].double(), moment[kept][:, cut].double()
    failed = True
    while failed:
        factor, failed = torch.linalg.cholesky_ex(among + damping * torch.eye(len(kept)).to(among))
        damping *= 10
    return torch.cholesky_solve(across, factor).T.float().contiguous()


@dataclass(frozen=True)
class Footprint:
    """What compensation takes of a space, in bytes."""

    saved: int
    """Moments in the super-adapter's directory."""
    calibration: int
    """Moments that are added up in one pass."""
    solutions: int
    """All choices of all layers, solved; no more than `compensation.room_mb` is held at a time."""


def footprint(space: BoundSpace, columns: Mapping[str, int], room: float) -> Footprint:
    """Of the layers with so many columns, at most `room` bytes of moments in one pass."""
    saved = sums = solutions = 0
    widths = {site: columns[site] for site in space.reading} | widths_of(space)
    for site, n in widths.items():
        saved += 4 * n + n * (n - 1)  # float32, and half of a matrix in float16
        sums += 4 * n * n
        solutions += 4 * sum(kept * (n - kept) for kept in _kept(space, site))
    largest = max((4 * n**2 for n in widths.values()), default=0)
    return Footprint(saved, min(sums, max(int(room), largest)), solutions)


def _kept(space: BoundSpace, site: str) -> Iterator[int]:
    """How many columns of a layer, or channels of an expert, any choices keep."""
    if (site, "in") not in space.axes:
        yield from space.mixtures[site.rpartition(".")[0]][1][EXPERT_WIDTH].choices
        return
    cuts = space.axes[site, "in"]
    for choices in itertools.product(*(group.choices for group, _ in cuts)):
        chosen = zip(cuts, choices, strict=True)
        ranges = (cut.kept(choice, group.choices[0]) for (group, cut), choice in chosen)
        yield sum(length for _, length in functools.reduce(common, ranges))
