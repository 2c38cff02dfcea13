"""PRoLoRA (Wang et al. 2024, arXiv 2402.16902): most ranks are small chunks, repeated along the
channels and rotated along the ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from elastic.adapters.base import Adapter, kaiming_
from elastic.config import AdapterConfig


class Prolora(Adapter):
    """ΔW = alpha / max_rank · B_full A_full, expanded from chunks and a few unshared ranks.

    With S shared ranks and chunks of `chunk` input channels, row p of A_full shows
    A_chunk[(p + ⌊j / chunk⌋ · shift) mod S, j mod chunk] at channel j; B alike along its outputs.
    A smaller rank expands first and cuts after, unshared ranks first: expanding a cut chunk would
    rearrange it, since modulus and stride depend on S.

    Shapes: A_chunk (S, chunk_in), B_chunk (chunk_out, S), A_unshared (u, in_features),
    B_unshared (out_features, u), u + S = max_rank.
    """

    along_in: ClassVar = {"A_unshared": 1, "gather_A": 1}
    along_out: ClassVar = {"B_unshared": 0, "gather_B": 0}
    fast = ("B_chunk", "B_unshared")
    gather_A: Tensor
    gather_B: Tensor

    def __init__(
        self, config: AdapterConfig, out_features: int, in_features: int, **factory: Any
    ) -> None:
        super().__init__(config, out_features, in_features)
        self.settings = config.prolora
        self.unshared = config.prolora.unshared_rank
        shared = config.rank - self.unshared
        gather_A = _gather(in_features, config.prolora.share_in, shared, self.settings.rotation)
        gather_B = _gather(out_features, config.prolora.share_out, shared, self.settings.rotation)
        chunk_in = -(-in_features // config.prolora.share_in)
        chunk_out = -(-out_features // config.prolora.share_out)
        self.A_chunk = nn.Parameter(torch.zeros(shared, chunk_in, **factory))
        self.B_chunk = nn.Parameter(torch.zeros(chunk_out, shared, **factory))
        self.A_unshared = nn.Parameter(torch.zeros(self.unshared, in_features, **factory))
        self.B_unshared = nn.Parameter(torch.zeros(out_features, self.unshared, **factory))
        # Where each element of the expansion stands in its chunk; follows the channel order.
        device = factory.get("device")
        self.register_buffer("gather_A", gather_A.to(device), persistent=False)
        self.register_buffer("gather_B", gather_B.T.contiguous().to(device), persistent=False)

    @classmethod
    def refuse_rank(cls, config: AdapterConfig, rank: int) -> str | None:
        least = max(1, config.prolora.unshared_rank)
        if rank >= least:
            return None
        return f"rank {rank} is below the {least} unshared ranks, which are always kept"

    def start(self, weight: Tensor, generator: torch.Generator) -> None:
        in_features = self.A_unshared.shape[1]
        # Rectified: the variance of the layer, not of the chunk, which would be too wide.
        sees = in_features if self.settings.rectified else self.A_chunk.shape[1]
        kaiming_(self.A_unshared, in_features, generator)
        kaiming_(self.A_chunk, sees, generator)
        nn.init.zeros_(self.B_chunk)
        nn.init.zeros_(self.B_unshared)

    def unscaled(self, rank: int) -> tuple[Tensor, Tensor]:
        shared = rank - self.unshared
        A = self.A_chunk.flatten()[self.gather_A[:shared]]
        B = self.B_chunk.T.flatten()[self.gather_B[:, :shared]]
        return torch.cat([self.A_unshared, A]), torch.cat([self.B_unshared, B], 1)


def _gather(size: int, multiple: int, shared: int, rotation: bool) -> Tensor:
    """(shared, size) int64: for rank p and channel j the place in a flattened (shared, chunk)."""
    chunk = -(-size // multiple)
    shift = max(shared // multiple, 1) if rotation else 0
    channel = torch.arange(size)
    row = (torch.arange(shared)[:, None] + channel // chunk * shift) % max(shared, 1)
    return row * chunk + channel % chunk
