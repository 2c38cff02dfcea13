"""Modules whose tensors have something for every expert, run on those of the experts and channels
that are active.

The code that runs is the family's own: it gets views of its tensors for the time of a call. Where
gate and up lie one half behind the other, fewer channels of both are no view, and are copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from elastic.spaces.dims import Cut, Ranges, channel_index
from elastic.spaces.mixtures import Axis, Mixture


class ElasticExperts(nn.Module):
    """A frozen module of experts, or the router that chooses among them, of which some is active.

    What its code does not find here is the module's own, tensors as they are active.
    """

    def __init__(self, base: nn.Module, axes: Sequence[Axis], full: Mapping[str, int]) -> None:
        """`full`: the largest choice of experts and of channels."""
        super().__init__()
        self.base = base
        self.axes = tuple(axes)
        self.full = dict(full)
        self.size = dict(full)
        """What is active: `experts` of every group, and `channels` of each."""
        self.made_up: Tensor | None = None
        """(experts, cut channels, active channels): the active ones of an expert take over so much
        of each cut one, times the degree, to make up for it; None: nothing."""
        self.degree = 0.0
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(super().__getattr__("base"), name)
            return self.cut(name, value) if isinstance(value, Tensor) else value

    @property
    def is_whole(self) -> bool:
        return self.size == self.full

    def tensors(self) -> dict[str, Tensor]:
        """Those that are cut, in full."""
        return {name: _tensor(self.base, name) for name in {axis.tensor: 0 for axis in self.axes}}

    def cut(self, name: str, tensor: Tensor, size: Mapping[str, int] | None = None) -> Tensor:
        """What is active, or is at this size, of a tensor of this name: a view where it can be."""
        size = size or self.size
        for axis in self.axes:
            if axis.tensor == name:
                left = axis.kept(size[axis.of], self.full[axis.of])
                tensor = leading(tensor, axis.number, left)
        return tensor

    def active(self) -> dict[str, Tensor]:
        """Those that are cut, as they are active."""
        return {name: self.cut(name, tensor) for name, tensor in self.tensors().items()}

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        if self.is_whole:
            return self.base(*arguments, **settings)
        return functional_call(self.base, self.active(), arguments, settings)


class MixtureLayers:
    """The modules of one mixture in a supernet, with all that says how large it is."""

    def __init__(self, model: nn.Module, mixture: Mixture) -> None:
        """Puts them around the model's, in place."""
        self.mixture = mixture
        full = {"experts": mixture.count, "channels": mixture.width}
        self.experts = ElasticExperts(model.get_submodule(mixture.experts), mixture.axes, full)
        self.modules = {mixture.experts: self.experts}
        model.set_submodule(mixture.experts, self.experts)
        self.router: ElasticExperts | None = None
        if mixture.router is not None:
            router = model.get_submodule(mixture.router)
            self.router = ElasticExperts(router, mixture.router_axes, full)
            self.modules[mixture.router] = self.router
            model.set_submodule(mixture.router, self.router)
        self._says = {
            "experts": [(_owner(model, name), key) for name, key in mixture.counted],
            "channels": [(_owner(model, name), key) for name, key in mixture.measured],
        }

    def keep(self, of: str, choice: int) -> None:
        """Make so many experts (of every group), or channels of each, active."""
        for module in self.modules.values():
            module.size[of] = choice
        number = choice * (self.mixture.groups if of == "experts" else 1)
        for module, name in self._says[of]:
            setattr(module, name, number)

    @torch.no_grad()
    def reorder(self, experts: Tensor | None, channels: Tensor | None) -> None:
        """Permute the tensors in place, as `reordered` has it."""
        for module in self.modules.values():
            for name, tensor in module.tensors().items():
                tensor.copy_(reordered(tensor, name, module.axes, experts, channels))


def reordered(
    tensor: Tensor,
    name: str,
    axes: Sequence[Axis],
    experts: Tensor | None,
    channels: Tensor | None,
) -> Tensor:
    """A tensor whose experts stand in another order, (experts,) or of each group (groups, experts
    of it), and the channels of each in its own, (all experts, channels), of experts as they stood
    before; None: as they are."""
    for axis in axes:
        if axis.tensor == name and axis.of == "channels" and channels is not None:
            cut = Cut("", "out", sum(axis.parts), axis.parts)
            index = torch.stack([channel_index(order, cut) for order in channels.cpu()])
            index = index.to(tensor.device)
            if axis.number == 2:
                index = index[:, None]
            elif tensor.dim() == 3:
                index = index[:, :, None]
            tensor = torch.take_along_dim(tensor, index, axis.number)
    for axis in axes:
        if axis.tensor == name and axis.of == "experts" and experts is not None:
            index = expert_index(experts).to(tensor.device)
            tensor = tensor.index_select(axis.number, index)
    return tensor


def expert_index(order: Tensor) -> Tensor:
    """Which expert stands at each place, (all experts,), of the order in each group."""
    groups = order.cpu().reshape(-1, order.shape[-1])
    starts = torch.arange(len(groups))[:, None] * groups.shape[1]
    return (groups + starts).flatten()


def leading(tensor: Tensor, axis: int, left: Ranges) -> Tensor:
    """What is left of an axis, (start, length) of each of its parts: a view where that is one."""
    if sum(length for _, length in left) == tensor.shape[axis]:
        return tensor
    if len(left) == 1:
        return tensor.narrow(axis, *left[0])
    return torch.cat([tensor.narrow(axis, *part) for part in left], axis)


def _tensor(module: nn.Module, name: str) -> Tensor:
    site, _, leaf = name.rpartition(".")
    tensor = getattr(module.get_submodule(site), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def _owner(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    return module.base if isinstance(module, ElasticExperts) else module
