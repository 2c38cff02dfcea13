"""Mixtures of experts as a graph can say them: one expert after another, each on its own tokens.

The implementations of transformers are loops over the experts that the example happens to meet,
kernels that no graph format has, or a gathered matrix for every token, which no machine has the
memory for where a prompt is long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elastic.models.modules import instead, plain_linear
from elastic.spaces.mixtures import mixtures

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EveryExpert(nn.Module):
    """The experts of one block, each two linear layers around its part of their tensors."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.act = experts._apply_gate if experts.has_gate else experts.act_fn
        self.up = _layers(experts, "gate_up_proj" if experts.has_gate else "up_proj")
        self.down = _layers(experts, "down_proj")

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Shapes: hidden (tokens, hidden), chosen and weights (tokens, top k)."""
        total = torch.zeros_like(hidden)
        for expert, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            tokens, places = torch.where(chosen == expert)
            added = down(self.act(up(hidden[tokens]))) * weights[tokens, places][:, None]
            index = tokens[:, None].expand(-1, hidden.shape[1])
            total = total.scatter_add(0, index, added.to(total.dtype))
        return total


def _layers(experts: Any, name: str) -> nn.ModuleList:
    """One for each expert, (out, in)."""
    weights = getattr(experts, name).detach()
    if experts.is_transposed:
        weights = weights.transpose(1, 2)
    biases = (
        getattr(experts, f"{name}_bias").detach() if experts.has_bias else [None] * len(weights)
    )
    return nn.ModuleList(
        plain_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)
    )


@contextlib.contextmanager
def written_out(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block every mixture of the model computes so."""
    names = [each.experts for each in mixtures(model)]
    with instead(model, {name: EveryExpert(model.get_submodule(name)) for name in names}):
        yield
