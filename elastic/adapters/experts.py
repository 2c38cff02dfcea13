"""Modules whose tensors have something for every expert, run on those of the experts and channels
that are active, with their factors: elastic ones in the supernet, small ones in a sliced model.

The code that runs is the family's own: it gets views of its tensors for the time of a call. Where
gate and up lie one half behind the other, fewer channels of both are no view, and are copied. Where
there are factors, W + B A of all active experts is made, as PEFT makes it, for code reads weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from elastic.adapters.base import Adapter
from elastic.adapters.layers import leading
from elastic.models.modules import put_
from elastic.spaces.dims import Cut, channel_index
from elastic.spaces.mixtures import DOWN, Axis, Mixture, core
from elastic.spaces.targets import factor_axes, is_transposed


@dataclass
class ExpertSize:
    """What is active of a mixture."""

    experts: int
    """Of every group of the router's."""
    channels: int
    """Of each expert."""
    solution: Callable[[int], Tensor | None] | None = None
    """By the place of an expert, (cut channels, active channels): the active ones take over so much
    of each cut one, times the degree, to make up for it; None: nothing."""
    degree: float = 0.0
    made: tuple[Any, ...] = field(default=(None, None, None), compare=False, repr=False)
    """The tensor that was made up for last, at which size, and what is active of it."""

    def __deepcopy__(self, memo: Any) -> ExpertSize:
        """A copied model asks the same for solutions."""
        return replace(self)


@dataclass
class Rank:
    """What is active of the factors of one matrix of all experts."""

    rank: int


class ExpertFactors(nn.Module):
    """The factors of one matrix of all experts. They stand in the module of experts by the name of
    the matrix, as those of a linear layer stand in its place."""

    def __init__(self, adapter: Adapter, mixture: Mixture, tensor: str) -> None:
        super().__init__()
        self.adapter = adapter
        self.axes = factor_axes(mixture, tensor)
        self.is_transposed = is_transposed(mixture)
        self.reads_channels = tensor == DOWN
        self.size = Rank(adapter.max_rank)

    def active(
        self, size: ExpertSize, full: ExpertSize, rank: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """A (experts, rank, columns) and B (experts, rows, rank) without the scale, of what is left
        of the matrix (experts, rows, columns) at this size; at the active rank, unless given."""
        A, B = self.adapter.unscaled(self.size.rank if rank is None else rank)
        A = part_of(A, self.axes["A"], size, full, reads_channels=self.reads_channels)
        return as_they_lie(A, part_of(B, self.axes["B"], size, full), self.is_transposed)

    @torch.no_grad()
    def reorder(self, experts: Tensor | None, channels: Tensor | None) -> None:
        """Follow the matrix, in place (see `reordered`)."""
        for name, axes in self.axes.items():
            tensor = getattr(self.adapter, name)
            tensor.copy_(reordered(tensor, name, axes, experts, channels))

    def of_base(
        self, A: Tensor, B: Tensor, experts: Tensor | None, channels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Factors of all experts and channels, in the order before that."""
        A = as_before(A, "A", self.axes["A"], experts, channels)
        return A, as_before(B, "B", self.axes["B"], experts, channels)


class ElasticExperts(nn.Module):
    """A frozen module of experts, or the router that chooses among them, of which some is active.

    What its code does not find here is the module's own, tensors as they are active.
    """

    def __init__(self, base: nn.Module, axes: Sequence[Axis], full: ExpertSize) -> None:
        super().__init__()
        self.base = base
        self.axes = tuple(axes)
        self.full = full
        self.size = replace(full)
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(super().__getattr__("base"), name)
            return self.cut(name, value) if isinstance(value, Tensor) else value

    @property
    def is_whole(self) -> bool:
        """Whether all of it is active."""
        size, full = self.size, self.full
        return size.experts == full.experts and size.channels == full.channels

    @property
    def factors(self) -> dict[str, ExpertFactors]:
        """By the name of their matrix."""
        children = self.named_children()
        return {name: child for name, child in children if isinstance(child, ExpertFactors)}

    def tensors(self) -> dict[str, Tensor]:
        """Those that are cut, in full."""
        return {name: _tensor(self.base, name) for name in {axis.tensor: 0 for axis in self.axes}}

    def cut(self, name: str, tensor: Tensor, size: ExpertSize | None = None) -> Tensor:
        """What is active, or is at this size, of a tensor of this name: a view where it can be."""
        axes = [axis for axis in self.axes if axis.tensor == name]
        return part_of(tensor, axes, size or self.size, self.full, reads_channels=name == DOWN)

    def without_update(self) -> dict[str, Tensor]:
        """Those that are cut, as they are active, without what factors add."""
        found = {}
        for name, tensor in self.tensors().items():
            if name == DOWN and self.size.solution:
                owner, size, made_up = self.size.made
                if owner is not tensor or size != self.size:
                    made_up = self.cut(name, tensor)
                    self.size.made = tensor, replace(self.size), made_up
                found[name] = made_up
            else:
                found[name] = self.cut(name, tensor)
        return found

    def active(self) -> dict[str, Tensor]:
        """Those that are cut, as they are active."""
        return self._updated(self.without_update(), self.size, {})

    def at(self, size: ExpertSize, ranks: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """The same at this size, and with so many ranks of some matrices, by name."""
        tensors = {name: self.cut(name, tensor, size) for name, tensor in self.tensors().items()}
        return self._updated(tensors, size, ranks or {})

    def _updated(
        self, tensors: dict[str, Tensor], size: ExpertSize, ranks: Mapping[str, int]
    ) -> dict[str, Tensor]:
        for name, factors in self.factors.items():
            weight = tensors[name]
            A, B = (f.to(weight.dtype) for f in factors.active(size, self.full, ranks.get(name)))
            tensors[name] = torch.baddbmm(weight, B, A, alpha=factors.adapter.scale)
        return tensors

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        if self.is_whole and not self.factors:
            return self.base(*arguments, **settings)
        return functional_call(self.base, self.active(), arguments, settings)


class FactorExperts(nn.Module):
    """A module of experts plus factors of a fixed rank: one of a sliced, unmerged model.

    Shapes, by matrix (experts, rows, columns): A (experts, rank, columns), B (experts, rows, rank)
    with the scale inside.
    """

    def __init__(self, base: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.base = base
        self.A = nn.ParameterDict({name: A for name, (A, _) in factors.items()})
        self.B = nn.ParameterDict({name: B for name, (_, B) in factors.items()})
        self.requires_grad_(False)

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        tensors = {}
        for name, A in self.A.items():
            weight = getattr(self.base, name)
            tensors[name] = torch.baddbmm(weight, self.B[name].to(weight), A.to(weight))
        return functional_call(self.base, tensors, arguments, settings)


class MixtureLayers:
    """The modules of one mixture in a supernet, with all that says how large it is."""

    def __init__(self, model: nn.Module, mixture: Mixture) -> None:
        """Puts them around the model's, in place."""
        self.mixture = mixture
        full = ExpertSize(mixture.count, mixture.width)
        base = model.get_submodule(mixture.experts)
        self.experts = ElasticExperts(base, mixture.axes, full)
        self.modules = {mixture.experts: self.experts}
        model.set_submodule(mixture.experts, self.experts)
        self.router: ElasticExperts | None = None
        if mixture.router is not None:
            router = model.get_submodule(mixture.router)
            self.router = ElasticExperts(router, mixture.router_axes, full)
            self.modules[mixture.router] = self.router
            model.set_submodule(mixture.router, self.router)
        self.beside = {
            held.name: _tensor(model, held.name) for held in mixture.beside if self.router
        }
        """What the block itself has for each expert, whole, by name."""
        self._model = model
        self._says: dict[str, list[tuple[nn.Module, str]]] = {
            "experts": [(_owner(model, name), key) for name, key in mixture.counted],
            "channels": [(_owner(model, name), key) for name, key in mixture.measured],
        }

    def adapt(self, tensor: str, adapter: Adapter) -> None:
        """Give a matrix of all experts factors."""
        setattr(self.experts, tensor, ExpertFactors(adapter, self.mixture, tensor))

    def keep(self, of: str, choice: int) -> None:
        """Make so many experts (of every group), or channels of each, active."""
        for module in self.modules.values():
            setattr(module.size, of, choice)
        number = choice * (self.mixture.groups if of == "experts" else 1)
        for owner, name in self._says[of]:
            setattr(owner, name, number)
        for name, tensor in self.beside.items() if of == "experts" else ():
            put_(self._model, name, self.cut_beside(tensor, choice))

    def cut_beside(self, tensor: Tensor, choice: int) -> Tensor:
        """What is left of a number for each expert, a parameter where it was one."""
        each = Axis("", "experts", 0, (1,) * self.mixture.groups)
        left = leading(tensor, 0, each.kept(choice, self.mixture.count))
        if left is tensor:
            return tensor
        return nn.Parameter(left, False) if isinstance(tensor, nn.Parameter) else left.clone()

    def make_up(self, solution: Callable[[int], Tensor | None] | None, degree: float) -> None:
        """Let the channels of every expert take over so much of those that are cut."""
        size = self.experts.size
        size.solution, size.degree = solution, degree
        if solution is None:
            size.made = (None, None, None)

    def reorder_factors(self, experts: Tensor | None, channels: Tensor | None) -> None:
        """Let factors follow the tensors, in place."""
        for factors in self.experts.factors.values():
            factors.reorder(experts, channels)

    @torch.no_grad()
    def reorder(self, experts: Tensor | None, channels: Tensor | None) -> None:
        """Permute the tensors in place, as `reordered` has it."""
        for module in self.modules.values():
            for name, tensor in module.tensors().items():
                tensor.copy_(reordered(tensor, name, module.axes, experts, channels))
        if experts is not None:
            for tensor in self.beside.values():
                tensor.copy_(tensor[expert_index(experts).to(tensor.device)])


def as_they_lie(A: Tensor, B: Tensor, is_transposed: bool) -> tuple[Tensor, Tensor]:
    """Factors (experts, rank, in) and (experts, out, rank), so that B A lies as their matrix."""
    return (B.mT, A.mT) if is_transposed else (A, B)


def part_of(
    tensor: Tensor,
    axes: Sequence[Axis],
    size: ExpertSize,
    full: ExpertSize,
    *,
    reads_channels: bool = False,
) -> Tensor:
    """What is left of a tensor by its axes, a view where it can be. Of one that reads the channels
    of experts, with what the active ones take over of those that are cut."""
    if reads_channels and size.solution and size.channels < full.channels:
        return _made_up(tensor, axes, size, full)
    for axis in axes:
        left = axis.kept(getattr(size, axis.of), getattr(full, axis.of))
        tensor = leading(tensor, axis.number, left)
    return tensor


def _made_up(tensor: Tensor, axes: Sequence[Axis], size: ExpertSize, full: ExpertSize) -> Tensor:
    """Summed in float32 or wider."""
    experts, channels = (next(axis for axis in axes if axis.of == of)
                         for of in ("experts", "channels"))  # fmt: skip
    left = experts.kept(size.experts, full.experts)
    places = [place for start, length in left for place in range(start, start + length)]
    wide = torch.promote_types(tensor.dtype, torch.float32)
    active = torch.empty(0)
    for at, place in enumerate(places):
        one = tensor[place].T if channels.number == 1 else tensor[place]
        kept = one[:, : size.channels].to(wide)
        assert size.solution is not None
        solved = size.solution(place)
        if solved is not None:
            behind = one[:, size.channels :].to(wide)
            kept = torch.addmm(kept, behind, solved.to(kept), alpha=size.degree)
        kept = (kept.T if channels.number == 1 else kept).to(tensor.dtype)
        active = kept.new_empty(len(places), *kept.shape) if not at else active
        active[at] = kept
    return active


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
            moved = torch.empty_like(tensor)
            for place, order in enumerate(channels.cpu()):
                index = channel_index(order, cut).to(tensor.device)
                moved[place] = tensor[place].index_select(axis.number - 1, index)
            tensor = moved
    for axis in axes:
        if axis.tensor == name and axis.of == "experts" and experts is not None:
            index = expert_index(experts).to(tensor.device)
            tensor = tensor.index_select(axis.number, index)
    return tensor


def as_before(
    tensor: Tensor,
    name: str,
    axes: Sequence[Axis],
    experts: Tensor | None,
    channels: Tensor | None,
) -> Tensor:
    """The inverse of `reordered`."""
    if experts is not None:
        tensor = reordered(tensor, name, axes, experts.argsort(-1), None)
    return tensor if channels is None else reordered(tensor, name, axes, None, channels.argsort(-1))


def expert_index(order: Tensor) -> Tensor:
    """Which expert stands at each place, (all experts,), of the order in each group."""
    groups = order.cpu().reshape(-1, order.shape[-1])
    starts = torch.arange(len(groups))[:, None] * groups.shape[1]
    return (groups + starts).flatten()


def _tensor(module: nn.Module, name: str) -> Tensor:
    site, _, leaf = name.rpartition(".")
    tensor = getattr(module.get_submodule(site), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def _owner(model: nn.Module, name: str) -> nn.Module:
    owner: nn.Module = core(model.get_submodule(name))
    return owner
