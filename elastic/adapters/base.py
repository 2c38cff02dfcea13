"""The contract every adapter method keeps: a weight update is a pair of low-rank factors."""

from __future__ import annotations

from torch import Tensor, nn


class Adapter(nn.Module):
    """One layer's update, ΔW = B A, usable at any rank up to `max_rank`.

    What a method owns is how its parameters become factors and how they start. Forward passes,
    slicing, merging and every export are written once, against `factors`.
    """

    max_rank: int
    scale: float = 1.0
    """Already inside B; exports that store a scale of their own divide by it."""

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A (rank, in_features) and B (out_features, rank) with every scale inside.

        Methods nest: the factors at a rank are what training at any larger rank also trained.
        """
        raise NotImplementedError

    def reorder(self, axis: str, index: Tensor) -> None:
        """Follow a permutation of the layer's channels on `axis` ("out" or "in"), in place."""
        raise NotImplementedError
