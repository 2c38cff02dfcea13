"""LoRA (Hu et al. 2021, arXiv 2106.09685) with an elastic rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from elastic.adapters.base import Adapter


class Lora(Adapter):
    """ΔW = alpha / max_rank · B A.

    Every rank shares the leading rows of A and columns of B, so training a large sub-adapter also
    trains the smaller ones inside it. A starts as PEFT's does (Kaiming uniform), B at zero.

    Shapes: A (max_rank, in_features), B (out_features, max_rank).
    """

    def __init__(
        self, linear: nn.Linear, *, rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.max_rank = rank
        self.scale = alpha / rank
        # Factors stay float32 under a bfloat16 base: their updates are too small for its rounding.
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        bound = 1 / math.sqrt(linear.in_features)
        uniform = torch.rand(rank, linear.in_features, generator=generator, dtype=dtype)
        device = linear.weight.device
        self.A = nn.Parameter((uniform * 2 * bound - bound).to(device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=dtype, device=device))

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        return self.A[:rank], self.scale * self.B[:, :rank]

    @torch.no_grad()
    def reorder(self, axis: str, index: Tensor) -> None:
        if axis == "out":
            self.B.copy_(self.B[index])
        else:
            self.A.copy_(self.A[:, index])
