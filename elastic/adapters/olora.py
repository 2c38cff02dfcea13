"""O-LoRA (Wang et al. 2023, arXiv 2310.14152): a sequence of tasks, each in a subspace of its own.

Not the QR initialisation that is also called OLoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from elastic.adapters.base import Adapter, kaiming_
from elastic.config import AdapterConfig


class Olora(Adapter):
    """ΔW = alpha / max_rank · ([B_old, B] [A_old; A]): finished tasks frozen, one in training.

    The rank of a sub-adapter counts ranks of the task in training; finished tasks keep theirs
    (`shrink: newest`), or every task keeps its first ones (`shrink: all`).

    Shapes: A (max_rank, in_features), B (out_features, max_rank); A_old (sum of finished ranks,
    in_features), B_old (out_features, same), oldest task first.
    """

    along_in: ClassVar = {"A": 1, "A_old": 1}
    along_out: ClassVar = {"B": 0, "B_old": 0}

    def __init__(
        self, config: AdapterConfig, out_features: int, in_features: int, **factory: Any
    ) -> None:
        super().__init__(config, out_features, in_features)
        self.settings = config.olora
        self.A = nn.Parameter(torch.zeros(config.rank, in_features, **factory))
        self.B = nn.Parameter(torch.zeros(out_features, config.rank, **factory))
        self.register_buffer("A_old", torch.zeros(0, in_features, **factory))
        self.register_buffer("B_old", torch.zeros(out_features, 0, **factory))

    def start(self, weight: Tensor, generator: torch.Generator) -> None:
        kaiming_(self.A, self.A.shape[1], generator)
        nn.init.zeros_(self.B)

    def unscaled(self, rank: int) -> tuple[Tensor, Tensor]:
        A, B, A_old, B_old = self.A[:rank], self.B[:, :rank], self.A_old, self.B_old
        if len(A_old) == 0:
            return A, B
        if self.settings.shrink == "all":
            # Rank 1 of every task, then rank 2 of every task: so smaller ranks lead.
            A = torch.cat([A_old.unflatten(0, (-1, self.max_rank))[:, :rank], A[None]])
            B = torch.cat([B_old.unflatten(1, (-1, self.max_rank))[:, :, :rank], B[:, None]], 1)
            return A.transpose(0, 1).flatten(0, 1), B.transpose(1, 2).flatten(1, 2)
        return torch.cat([A_old, A]), torch.cat([B_old, B], 1)

    def penalty(self, rank: int) -> Tensor | None:
        """lambda_1 · Σ |A_old Aᵀ| + lambda_2 · (‖A‖_F + ‖B‖_F), A and B at their active rank.

        Sums over entries and layers, as published: the value grows with rank, tasks and depth.
        """
        settings, A, B = self.settings, self.A[:rank], self.B[:, :rank]
        terms = []
        if settings.lambda_1 and len(self.A_old):
            overlap = self.A_old @ A.T
            squared = settings.orthogonality == "squared"
            terms.append(settings.lambda_1 * (overlap**2 if squared else overlap.abs()).sum())
        if settings.lambda_2:
            norms = torch.linalg.vector_norm(A) + torch.linalg.vector_norm(B)
            terms.append(settings.lambda_2 * norms)
        return torch.stack(terms).sum() if terms else None

    def shapes(self, state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Finished tasks may be any in number."""
        wanted = super().shapes(state)
        if "A_old" in state:
            finished = len(state["A_old"])
            wanted["A_old"] = (finished, self.A.shape[1])
            wanted["B_old"] = (self.B.shape[0], finished)
        return wanted

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        self.A_old = self.A.new_zeros(state["A_old"].shape)
        self.B_old = self.B.new_zeros(state["B_old"].shape)
        super().load(state)

    @torch.no_grad()
    def succeed(self, state: Mapping[str, Tensor], generator: torch.Generator) -> None:
        """Freeze what was trained behind the tasks before it and start new factors."""
        self.load(state)
        self.A_old = torch.cat([self.A_old, self.A])
        self.B_old = torch.cat([self.B_old, self.B], 1)
        self.start(self.B, generator)
