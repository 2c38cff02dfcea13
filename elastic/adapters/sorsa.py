"""SORSA (Cao 2024, arXiv 2409.00055): the leading singular triplets of the base weight, trained
and kept orthonormal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from elastic.adapters.base import Adapter
from elastic.config import AdapterConfig

OVERSAMPLED, POWER_ITERATIONS = 16, 4
"""Randomised SVD (Halko et al. 2011, arXiv 0909.4061): extra directions, and subspace iterations
that separate close singular values."""


class Sorsa(Adapter):
    """ΔW = scale · Σᵢ (sᵢ bᵢ aᵢᵀ - s⁰ᵢ b⁰ᵢ a⁰ᵢᵀ), the trained principal part minus the initial one.

    The published layer subtracts the initial part from the base weight once; this is the same
    function with the base weight left as it is. A smaller rank puts the triplets beyond it back to
    their initial values, so no pretrained direction is ever cut. Each pair of factor rows is
    (a, a - a⁰) with columns (s b - s⁰ b⁰, s⁰ b⁰): the same sum, exactly zero at the start, and
    without cancellation when it is cast to bfloat16. The factor rank is 2 · rank.

    Shapes: A, A0 (max_rank, in_features), S, S0 (max_rank,), B, B0 (out_features, max_rank).
    """

    along_in: ClassVar = {"A": 1, "A0": 1}
    along_out: ClassVar = {"B": 0, "B0": 0}
    clip_penalty = False
    A0: Tensor
    S0: Tensor
    B0: Tensor

    def __init__(
        self, config: AdapterConfig, out_features: int, in_features: int, **factory: Any
    ) -> None:
        super().__init__(config, out_features, in_features)
        self.settings = config.sorsa
        rank = config.rank
        self.A = nn.Parameter(torch.zeros(rank, in_features, **factory))
        self.S = nn.Parameter(torch.zeros(rank, **factory))
        self.B = nn.Parameter(torch.zeros(out_features, rank, **factory))
        for name in ("A", "S", "B"):
            self.register_buffer(f"{name}0", torch.zeros_like(getattr(self, name)))

    @classmethod
    def refuse(cls, config: AdapterConfig, out_features: int, in_features: int) -> str | None:
        most = min(out_features, in_features)
        if config.rank <= most:
            return None
        return f"rank {config.rank} exceeds the {most} singular values of its weight"

    @torch.no_grad()
    def start(self, weight: Tensor, generator: torch.Generator) -> None:
        wide = weight.detach().to(self.A.dtype)  # float32 or better, whatever the base is in
        if self.settings.svd == "exact":
            U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
        else:
            U, S, Vh = _randomized_svd(wide, self.max_rank, generator)
        rank = self.max_rank
        for name, tensor in (("A", Vh[:rank]), ("S", S[:rank]), ("B", U[:, :rank])):
            getattr(self, name).copy_(tensor)
            getattr(self, f"{name}0").copy_(tensor)

    def unscaled(self, rank: int) -> tuple[Tensor, Tensor]:
        A, A0 = self.A[:rank], self.A0[:rank]
        B = self.B[:, :rank] * self.S[:rank]
        B0 = self.B0[:, :rank] * self.S0[:rank]
        rows = torch.stack([A, A - A0], 1).flatten(0, 1)
        return rows, torch.stack([B - B0, B0], 2).flatten(1, 2)

    def penalty(self, rank: int) -> Tensor | None:
        """gamma / 2 · (‖A Aᵀ - I‖_F + ‖Bᵀ B - I‖_F) of the active ranks; unsquared as published,
        so its gradient keeps a length of about gamma per matrix however small the violation is."""
        A, B = self.A[:rank], self.B[:, :rank]
        identity = torch.eye(rank, dtype=A.dtype, device=A.device)
        norms = [torch.linalg.vector_norm(G - identity) for G in (A @ A.T, B.T @ B)]
        if self.settings.regulariser == "squared":
            norms = [norm**2 for norm in norms]
        return self.settings.gamma / 2 * (norms[0] + norms[1])

    @staticmethod
    def total(penalties: Sequence[Tensor], learning_rate: float) -> Tensor:
        """The mean over layers, divided by the configured learning rate: gamma is a learning rate
        of its own, which follows the schedule."""
        return torch.stack(list(penalties)).mean() / learning_rate


def _randomized_svd(
    weight: Tensor, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    seed = int(torch.randint(2**31, (1,), generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        q = min(rank + OVERSAMPLED, *weight.shape)
        U, S, V = torch.svd_lowrank(weight, q=q, niter=POWER_ITERATIONS)
    return U, S, V.T
