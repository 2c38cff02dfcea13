"""A change of a layer, fitted to what is missing behind it; other tokens choose the ridge."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RIDGES = (0.01, 0.1, 1.0)


class Sums:
    """Products of a layer's inputs h (in, and 1 for a bias) and of errors e (out)."""

    def __init__(self, biased: bool = False) -> None:
        self.biased = biased
        self.inner: Tensor | float = 0.0
        self.outer: Tensor | float = 0.0
        self.square = 0.0

    def add(self, h: Tensor, e: Tensor) -> None:
        """Real tokens of one batch, (tokens, in) and (tokens, out)."""
        if self.biased:
            h = torch.cat([h, h.new_ones(len(h), 1)], 1)
        self.inner = self.inner + (h.T @ h).double()
        self.outer = self.outer + (e.T @ h).double()
        self.square += float(e.double().square().sum())

    def error(self, change: Tensor) -> float:
        """‖Δ h - e‖²."""
        inner, outer = torch.as_tensor(self.inner), torch.as_tensor(self.outer)
        return self.square + float((change @ inner * change).sum() - 2 * (change * outer).sum())

    def best(self, width: int, held_out: Sums) -> Tensor | None:
        """The change, (out, width and one for a bias), that is best on held-out tokens; None where
        none is."""
        inner, outer = torch.as_tensor(self.inner), torch.as_tensor(self.outer)
        if not inner.dim() or not torch.as_tensor(held_out.inner).dim():
            return None  # no token was seen
        scale = inner.diagonal()[:width].mean()
        if not (torch.isfinite(inner).all() and torch.isfinite(outer).all() and scale > 0):
            return None
        best, least = None, held_out.square
        for ridge in RIDGES:
            damping = torch.full_like(inner.diagonal(), float(ridge * scale))
            damping[width:] = 1e-6 * scale
            factor, failed = torch.linalg.cholesky_ex(inner + damping.diag())
            if failed:
                continue
            change = torch.cholesky_solve(outer.T, factor).T
            if (error := held_out.error(change)) < least:
                best, least = change, error
        return best

    def solve_(self, layer: nn.Linear, held_out: Sums) -> bool:
        """Change the layer by what is best on held-out tokens; whether anything is."""
        width = layer.in_features
        best = self.best(width, held_out)
        if best is None:
            return False
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        weight = layer.weight.to(wide) + best[:, :width].to(wide)
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
        if self.biased:
            bias = layer.bias.to(wide) + best[:, width].to(wide)
            layer.bias = nn.Parameter(bias.to(layer.bias.dtype), requires_grad=False)
        return True
