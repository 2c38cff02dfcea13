"""Mixtures of experts on tensors without data, which cannot say where a token is sent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from elastic.adapters.experts import ElasticExperts
from elastic.models.modules import instead
from elastic.spaces.mixtures import core, mixtures
from elastic.supernet.routed import given

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OneExpert(nn.Module):
    """As if all tokens were sent to one expert, as often as they are to several: as many operations
    and as much memory as of grouped matrix products, wherever tokens go."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *arguments: Any, **settings: Any) -> Tensor:
        hidden, chosen, weights = given(arguments, settings)
        own = core(self.experts)
        tensors = dict(own.named_parameters(recurse=False))
        if isinstance(self.experts, ElasticExperts):
            tensors |= self.experts.active()
        up = "gate_up_proj" if own.has_gate else "up_proj"
        x = hidden.repeat_interleave(chosen.shape[1], 0)
        x = _linear(x, tensors, up, own)
        x = own._apply_gate(x) if own.has_gate else own.act_fn(x)
        x = _linear(x, tensors, "down_proj", own) * weights.reshape(-1, 1)
        return x.view(*chosen.shape, -1).sum(1).to(hidden.dtype)


def _linear(x: Tensor, tensors: dict[str, Tensor], name: str, own: Any) -> Tensor:
    weight = tensors[name][0].to(x.dtype)
    y = x @ (weight if own.is_transposed else weight.T)
    return y + tensors[f"{name}_bias"][0] if own.has_bias else y


@contextlib.contextmanager
def one_expert(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block every mixture of the model computes so."""
    names = [each.experts for each in mixtures(model)]
    with instead(model, {name: OneExpert(model.get_submodule(name)) for name in names}):
        yield
