"""Experts that are modules of their own, in a list that sends them tokens, on tensors without data.

Which of them gets a token such tensors cannot say, and the list's code asks it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from elastic.models.modules import modules_of


class EveryExpert(nn.ModuleDict):
    """As if each of them got every token; they keep their names."""

    def forward(self, hidden: Tensor, *_: Any) -> Tensor:
        made: list[Tensor] = [expert(hidden) for expert in experts_of(self)]
        return sum(made[1:], made[0])


def experts_of(module: nn.ModuleDict) -> list[nn.Module]:
    """Those that compute something, unlike what is in the list beside them."""
    return [child for child in module.values() if any(True for _ in child.parameters())]


def lists_of(model: nn.Module) -> Iterator[tuple[str, nn.ModuleDict]]:
    """Name and module of every list that has code of its own and modules of one class in it."""
    for name, module in modules_of(model, nn.ModuleDict):
        own = "forward" in vars(type(module))
        if own and len({type(expert) for expert in experts_of(module)}) == 1:
            yield name, module


def to_every_expert_(model: nn.Module) -> None:
    """Let every list of a model do so, in place. Routers beside them cast themselves whenever they
    run, which buffers without data can bear and parameters cannot."""
    for name, module in lists_of(model):
        model.set_submodule(name, EveryExpert(dict(module.named_children())))
        experts = set(module.modules())
        for beside in model.get_submodule(name.rpartition(".")[0]).modules():
            own = {} if beside in experts else dict(beside.named_parameters(recurse=False))
            for key, parameter in own.items():
                delattr(beside, key)
                beside.register_buffer(key, parameter.detach())
