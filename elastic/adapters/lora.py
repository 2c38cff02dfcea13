"""LoRA (Hu et al. 2021, arXiv 2106.09685) with an elastic rank, of linear layers and of experts."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from elastic.adapters.base import Adapter, kaiming_
from elastic.config import AdapterConfig


class Lora(Adapter):
    """ΔW = alpha / max_rank · B A.

    Every rank shares the leading rows of A and columns of B, so training a large sub-adapter also
    trains the smaller ones inside it. A starts as PEFT's does (Kaiming uniform), B at zero.

    Shapes: A (max_rank, in_features), B (out_features, max_rank).
    """

    def __init__(self, config: AdapterConfig, *sizes: int, **factory: Any) -> None:
        *experts, out_features, in_features = sizes
        super().__init__(config, out_features, in_features)
        self.A = nn.Parameter(torch.zeros(*experts, config.rank, in_features, **factory))
        self.B = nn.Parameter(torch.zeros(*experts, out_features, config.rank, **factory))

    def start(self, weight: Tensor, generator: torch.Generator) -> None:
        kaiming_(self.A, self.A.shape[-1], generator)
        nn.init.zeros_(self.B)

    def unscaled(self, rank: int) -> tuple[Tensor, Tensor]:
        if rank == self.max_rank:
            return self.A, self.B
        return self.A[..., :rank, :], self.B[..., :rank]


class ExpertLora(Lora):
    """The same for every expert of a mixture: ΔW_e = alpha / max_rank · B_e A_e.

    Made of three sizes: experts, out_features, in_features. All experts have one rank. A smaller
    one keeps the leading ranks of each.

    Shapes: A (experts, max_rank, in_features), B (experts, out_features, max_rank); so are the
    factors.
    """

    along_in: ClassVar = {"A": 2}
    along_out: ClassVar = {"B": 1}
