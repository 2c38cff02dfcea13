"""Layers that carry factors: elastic ones in the supernet, small ones in a sliced model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from elastic.adapters.base import Adapter
from elastic.models.quantised import QuantisedLinear, frozen_linear
from elastic.spaces.dims import Ranges


class Size:
    """What is active in one elastic layer. A plain object: activation rewrites thousands of these,
    and an `nn.Module` attribute costs ten times as much."""

    __slots__ = ("column_parts", "columns", "degree", "made_up", "rank", "row_parts", "rows")

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        self.rows, self.columns, self.rank = rows, columns, rank
        self.row_parts: Ranges | None = None
        """Where an axis of several parts is cut: (start, length) of what is left of each."""
        self.column_parts: Ranges | None = None
        self.made_up: Tensor | None = None
        """(cut columns, active columns): the active ones take over so much of each cut one, times
        the degree, to make up for it; None: nothing."""
        self.degree = 0.0

    @property
    def left_rows(self) -> Ranges:
        """(start, length) of what is active of the rows."""
        return self.row_parts or ((0, self.rows),)

    @property
    def left_columns(self) -> Ranges:
        """The same of the columns."""
        return self.column_parts or ((0, self.columns),)

    def keep(self, axis: str, left: Ranges) -> None:
        """Make these rows ("out") or columns ("in") active: (start, length), the first from 0."""
        count = sum([length for _, length in left])
        parts = left if len(left) > 1 else None
        if axis == "out":
            self.rows, self.row_parts = count, parts
        else:
            self.columns, self.column_parts = count, parts

    def leading(self, tensor: Tensor) -> Tensor:
        """The active rows of (rows, ...)."""
        return leading(tensor, 0, self.left_rows)

    def leading_columns(self, tensor: Tensor) -> Tensor:
        """The active columns of (rows, columns)."""
        return leading(tensor, 1, self.left_columns)

    def compensated_columns(self, tensor: Tensor) -> Tensor:
        """The same of a matrix that is multiplied with the layer's input, with what they take over
        of the others; summed in float32 or wider."""
        active = self.leading_columns(tensor)
        if self.made_up is None:
            return active
        wide = torch.promote_types(tensor.dtype, torch.float32)
        made_up = self.made_up.to(tensor.device, wide)
        behind = self._behind(tensor).to(wide)
        return torch.addmm(active.to(wide), behind, made_up, alpha=self.degree).to(tensor.dtype)

    def _behind(self, tensor: Tensor) -> Tensor:
        """The columns that are not active, ascending."""
        parts = self.left_columns
        ends = [0, *(start + length for start, length in parts)]
        starts = [*(start for start, _ in parts), tensor.shape[1]]
        pieces = [tensor[:, a:b] for a, b in zip(ends, starts, strict=True) if a < b]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


class ElasticLinear(nn.Module):
    """A frozen linear layer and its factors, run on their leading rows, columns and ranks.

    The cut tensors are views, so a smaller sub-adapter costs fewer operations in training too.

    Shapes: x (..., columns) -> (..., rows).
    """

    def __init__(self, base: nn.Linear, adapter: Adapter | None, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.size = Size(
            base.out_features, base.in_features, adapter.max_rank if adapter is not None else 0
        )
        self._compensated: tuple[Any, ...] = (None, None, 0.0, torch.empty(0))
        """The base that was made up for last, by what, to which degree, and its weight with it."""
        self.train(base.training)  # new modules start in training mode, where dropout acts

    @property
    def weight(self) -> Tensor:
        """The active part of the base weight, (rows, columns)."""
        return self._source()()

    def _source(self) -> Callable[[], Tensor]:
        """Gives the weight that is active now, whatever is active when it is asked: the backward
        pass asks again, so that a dequantised weight need not be kept."""
        base, size = self.base, self.size
        rows, columns = size.left_rows, size.left_columns
        if size.made_up is None:
            return lambda: leading(leading(base.weight, 0, rows), 1, columns)
        owner, made_up, degree, weight = self._compensated
        if owner is not base or made_up is not size.made_up or degree != size.degree:
            weight = size.compensated_columns(base.weight)
            self._compensated = base, size.made_up, size.degree, weight
        return lambda: leading(weight, 0, rows)

    @property
    def bias(self) -> Tensor | None:
        return None if self.base.bias is None else self.size.leading(self.base.bias)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """The active A (rank, columns) and B (rows, rank); None without an adapter."""
        if self.adapter is None:
            return None
        return self._cut(*self.adapter.factors(self.size.rank))

    def _cut(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return self.size.compensated_columns(A), self.size.leading(B)

    def forward(self, x: Tensor) -> Tensor:
        if self.adapter is not None and self._lean(x):
            cut = self._cut(*self.adapter.unscaled(self.size.rank))
            A, B = (factor.to(x.dtype) for factor in cut)
            return _FactoredLinear.apply(x, self._source(), self.bias, A, B, self.adapter.scale)
        y = frozen_linear(x, self._source(), self.bias)
        if self.adapter is None:
            return y
        A, B = self._cut(*self.adapter.factors(self.size.rank))
        if self.adapter.dropout_on_rank:
            return y + F.linear(self.dropout(F.linear(x, A.to(x.dtype))), B.to(x.dtype))
        return _add_update(y, self.dropout(x), A, B)

    def _lean(self, x: Tensor) -> bool:
        """Whether nothing stands between x and both products: no dropout that acts, no autocast,
        which a function of its own would not see in its backward pass."""
        acts = self.training and isinstance(self.dropout, nn.Dropout)
        return not acts and not torch.is_autocast_enabled(x.device.type)


class _FactoredLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ as one node, adding into y instead of beside it.

    Composed of three linear layers, every output-sized sum is a pass over memory, forward and
    backward; on two CPU cores that is a tenth of the layer's time. W and bias are frozen; W is
    asked for in either pass.

    Shapes: x (..., in), weight() (out, in), bias (out,) or None, A (rank, in), B (out, rank).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = (rows @ A.T).mul_(scale)
        W = weight()
        # Not a view of what it was computed as: models may add to it in place.
        y = x.new_empty((*x.shape[:-1], W.shape[0]))
        flat = y.view(-1, W.shape[0])
        if bias is None:
            torch.mm(rows, W.T, out=flat)
        else:
            torch.addmm(bias, rows, W.T, out=flat)
        flat.addmm_(inner, B.T)
        ctx.weight, ctx.scale = weight, scale
        ctx.save_for_backward(rows, A, B, inner)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, A, B, inner = ctx.saved_tensors
        shape = (*grad.shape[:-1], rows.shape[1])
        grad = grad.reshape(-1, grad.shape[-1])
        grad_inner = (grad @ B).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ ctx.weight()).addmm_(grad_inner, A).view(shape)
        return grad_x, None, None, grad_inner.T @ rows, grad.T @ inner, None


class FactorLinear(nn.Linear):
    """A linear layer plus factors of a fixed rank: one layer of a sliced, unmerged model.

    Shapes: weight (out, in), A (rank, in), B (out, rank) with the scale inside.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return _add_update(F.linear(x, self.weight, self.bias), x, self.A, self.B)


def leading(tensor: Tensor, axis: int, left: Ranges) -> Tensor:
    """What is left of an axis, (start, length) of each of its parts: a view where that is one, else
    a copy."""
    if sum([length for _, length in left]) == tensor.shape[axis]:  # nothing is sliced in vain
        return tensor
    if len(left) == 1:
        return tensor.narrow(axis, *left[0])
    return torch.cat([tensor.narrow(axis, *part) for part in left], axis)


def _add_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return y + F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


@torch.no_grad()
def reorder_linear(linear: nn.Linear, axis: str, index: Tensor) -> None:
    """Permute the rows (with the bias) or columns of a linear layer, in place."""
    if isinstance(linear, QuantisedLinear):
        linear.reorder(axis, index)
    elif axis == "out":
        linear.weight.copy_(linear.weight[index])
        if linear.bias is not None:
            linear.bias.copy_(linear.bias[index])
    else:
        linear.weight.copy_(linear.weight[:, index])
