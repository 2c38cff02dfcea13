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

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from elastic.spaces.dims import Ranges

RIDGE = 0.01
ROOM = 1e9
"""Bytes of solutions that are remembered."""


class Compensation:
    """Solutions S for the layers of one supernet, solved when first asked for.

    Those asked for last are remembered as far as there is `room`, in bytes; the others are solved
    again.
    """

    def __init__(
        self, moments: Mapping[str, Tensor], ridge: float = RIDGE, room: float = ROOM
    ) -> None:
        self.moments, self.ridge, self.room = moments, ridge, room
        self._solved: OrderedDict[tuple[str, Ranges], Tensor] = OrderedDict()
        self._held = 0

    def __call__(self, site: str, left: Ranges) -> Tensor | None:
        """S (cut channels, kept channels), float32, where these (start, length) of a layer's input
        are left; None for a layer whose moments are not known."""
        if site not in self.moments:
            return None
        key = site, left
        if key not in self._solved:
            self._remember(key, solution(self.moments[site], left, self.ridge))
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
    stays = torch.zeros(len(moment), dtype=torch.bool)
    for start, length in left:
        stays[start : start + length] = True
    kept, cut = stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]
    damping = ridge * float(moment.diagonal().mean())
    if damping <= 0:
        return torch.zeros(len(cut), len(kept))
    among, across = moment[kept][:, kept].double(), moment[kept][:, cut].double()
    failed = True
    while failed:
        factor, failed = torch.linalg.cholesky_ex(among + damping * torch.eye(len(kept)).to(among))
        damping *= 10
    return torch.cholesky_solve(across, factor).T.float().contiguous()
