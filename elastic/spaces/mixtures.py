"""Mixtures of experts: where the tensors of all experts of a block lie, and what a choice cuts.

transformers keeps the weights of all experts of a block in tensors with one more axis in front and
says of their module how they lie: whether (in, out), whether gate and up are halves or take turns,
whether they have biases. A router beside them has a row for each expert. Nothing here knows a
family by its name; what lies otherwise is refused in words.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from elastic.errors import ConfigError
from elastic.spaces.dims import Cut, Ranges

EXPERTS, EXPERT_WIDTH = "experts", "expert_width"
"""A choice counts the experts that are kept (of routers that choose among groups of them first,
those of each group), or the channels that every expert keeps."""
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts")
"""What modules call the number of experts."""
CHANNELS = (
    "intermediate_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "expert_dim",
    "ffn_dim",
)
"""What modules of experts call the width of one."""
CHOSEN = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
"""What routers, and configurations, call the number of experts that a token is sent to."""
GROUPS, CHOSEN_GROUPS = ("num_group", "n_group", "num_expert_group"), ("topk_group",)
"""What routers call the groups that they choose among first, and how many of them they choose."""
FLAGS = ("is_transposed", "is_concatenated", "has_gate", "has_bias")
"""What modules of experts say of how their tensors lie."""
DOWN = "down_proj"
"""The tensor of all experts that reads their channels."""
ALIGN = 8
"""What the width of an expert is a multiple of: 16 bytes, in types of 16 bits."""
TOLD = 3
"""What modules of experts are called with: hidden states, the experts of each, their weights."""
PAIR = 2
"""Experts of a group that routers look at to rate it, and so have to be there."""


@dataclass(frozen=True)
class Axis:
    """One axis of one tensor, that a choice of experts or of channels cuts."""

    tensor: str
    """Its name in the module of experts, or in the router."""
    of: Literal["experts", "channels"]
    number: int
    parts: tuple[int, ...]
    """What a choice of 1 keeps of each of its parts, one behind another."""

    def kept(self, choice: int, full: int) -> Ranges:
        """(start, length) of what a choice of `full` keeps of the axis."""
        return Cut("", "out", sum(self.parts), self.parts).kept(choice, full)


@dataclass(frozen=True)
class Held:
    """One tensor."""

    name: str
    shape: tuple[int, ...]
    is_parameter: bool = True
    in_linear: bool = False
    """Whether a linear layer holds it."""


@dataclass(frozen=True)
class Mixture:
    """The experts of one block, and what chooses among them."""

    experts: str
    """Name of the module with tensors (experts, ...)."""
    router: str | None
    """Name of the module with a row for each of them; None where none is known."""
    count: int
    """Experts in one group of the router's."""
    groups: int
    """How many groups: 1 where it chooses among all."""
    width: int
    """Channels of an expert."""
    top_k: int | None
    """Experts that a token is sent to."""
    tensors: tuple[Held, ...]
    """All of the module of experts."""
    rows: tuple[Held, ...]
    """Those of the router that have something for each expert."""
    beside: tuple[Held, ...]
    """Those of the block around both, (all experts,), that have something for each, by their full
    names."""
    axes: tuple[Axis, ...]
    """Of the tensors of experts."""
    router_axes: tuple[Axis, ...]
    counted: tuple[tuple[str, str], ...]
    """Modules and their attributes that say how many experts there are, in all groups."""
    measured: tuple[tuple[str, str], ...]
    """Those that say how wide one is."""
    least: int = 1
    """Experts that a group must have."""

    @property
    def all_experts(self) -> int:
        return self.count * self.groups

    def elements(
        self, experts: int | None = None, channels: int | None = None, *, linear: bool = True
    ) -> Elements:
        """Of so many experts of each group, and channels of each of them; all, unless given.
        Without `linear`, those of linear layers of the router are left out."""
        kept = {
            "experts": self.count if experts is None else experts,
            "channels": self.width if channels is None else channels,
        }
        matrices = vectors = router = router_matrices = 0
        for tensor in self.tensors:
            number = math.prod(_left(tensor, self.axes, kept))
            matrices += number * (len(tensor.shape) == 3)
            vectors += number * (len(tensor.shape) < 3)
        for tensor in self.rows:
            if tensor.is_parameter and (linear or not tensor.in_linear):
                number = math.prod(_left(tensor, self.router_axes, kept))
                router += number
                router_matrices += number * (len(tensor.shape) == 2)
        there = kept["experts"] * self.groups
        router += there * sum(tensor.is_parameter for tensor in self.beside)
        return Elements(matrices, vectors, router, router_matrices)


@dataclass(frozen=True)
class Elements:
    """How many numbers a mixture holds."""

    matrices: int
    """In the matrices of all its experts."""
    vectors: int
    """In their biases."""
    router: int
    """In the parameters of what chooses among them that have something for each."""
    router_matrices: int
    """In those of them that are matrices."""


def _left(tensor: Held, axes: tuple[Axis, ...], kept: dict[str, int]) -> list[int]:
    left = list(tensor.shape)
    for axis in axes:
        if axis.tensor == tensor.name:
            left[axis.number] = kept[axis.of] * sum(axis.parts)
    return left


SHARES = [1.0, 0.875, 0.75, 0.625, 0.5]
"""Of experts, and of their widths, where nobody says what to choose from."""


def groups_of(block: nn.Module) -> dict[str, dict[str, Any]]:
    """What a section on such blocks declares of their mixtures, by group; those of which nothing
    but one size would be left are not told apart here."""
    found = list(mixtures(block))
    groups: dict[str, dict[str, Any]] = {}
    for number, each in enumerate(found):
        suffix = f"_{number}" if len(found) > 1 else ""
        declared = {"of": [each.experts], "choices": SHARES}
        if each.router is not None and each.top_k is not None:
            groups[f"{EXPERTS}{suffix}"] = {"dim": EXPERTS, **declared}
        groups[f"{EXPERT_WIDTH}{suffix}"] = {"dim": EXPERT_WIDTH, **declared, "align": ALIGN}
    return groups


def routers_of(block: nn.Module) -> tuple[str, ...]:
    """How the names of whatever is in a router of the block begin."""
    return tuple(f"{each.router}." for each in mixtures(block) if each.router is not None)


def core(module: nn.Module) -> Any:
    """The module itself, or the one inside of ours around it."""
    inside = getattr(module, "base", None)
    return inside if isinstance(inside, nn.Module) else module


def is_experts(module: nn.Module) -> bool:
    """Whether it holds the weights of all experts of a block, as transformers lays them out."""
    tensors = dict(module.named_parameters(recurse=False))
    return all(hasattr(module, flag) for flag in FLAGS) and any(
        tensor.dim() == 3 for tensor in tensors.values()
    )


def mixtures(model: nn.Module) -> Iterator[Mixture]:
    """Every mixture of a model whose layout is known, by the order of its modules."""
    for name, module in model.named_modules():
        if name.endswith(".base"):  # of ours, which has been told
            continue
        if is_experts(core(module)) and why_not(core(module)) is None:
            yield mixture_at(model, name)


def mixture_at(model: nn.Module, name: str) -> Mixture:
    """The one whose module of experts has this name; ConfigError for tensors of another layout."""
    experts = core(model.get_submodule(name))
    reason = why_not(experts)
    if reason:
        raise ConfigError(f"{name}: {reason}")
    tensors = dict(experts.named_parameters(recurse=False))
    number, width = _sizes(experts)
    above = name.rpartition(".")[0]
    beside = _beside(model, above, number)
    found = _router(model, above, name, number) if beside is not None else None
    router, rows = found or (None, ())
    where: list[nn.Module] = [core(model.get_submodule(each)) for each in (router, above) if each]
    groups, least = 1, 1
    top_k = _first(where, CHOSEN) or _first([_config(model)], CHOSEN)
    if router is not None:
        groups = _first(where, GROUPS) or 1
        chosen = _first(where, CHOSEN_GROUPS) or 1
        least = top_k or 1
        if groups > 1:
            least = max(PAIR, -(-least // chosen))
    each = (1,) * groups
    axes = tuple(_axes(experts, each))
    router_axes = tuple(Axis(row.name, "experts", row.shape.index(number), each) for row in rows)
    places = [each for each in (name, router, above) if each]
    return Mixture(
        experts=name,
        router=router,
        count=number // groups,
        groups=groups,
        width=width,
        top_k=top_k,
        tensors=tuple(Held(key, tuple(tensor.shape)) for key, tensor in tensors.items()),
        rows=rows,
        beside=beside or (),
        axes=axes,
        router_axes=router_axes,
        counted=(*_saying(model, places, COUNTS, number), *_linears(router, rows)),
        measured=tuple(_saying(model, [name], CHANNELS, width)),
        least=least,
    )


def why_not(experts: nn.Module) -> str | None:
    """Why the tensors of a module are not cut; None if they are."""
    kind, known = type(experts).__name__, dict(experts.named_parameters(recurse=False))
    if isinstance(experts, nn.ModuleDict | nn.ModuleList):
        return (
            f"{kind} holds its experts as modules of their own, whose layers carry factors; which "
            "of them a token is sent to is known inside of it alone"
        )
    asked = list(inspect.signature(experts.forward).parameters)
    if not is_experts(experts) and len(asked) < TOLD and any(p.dim() == 3 for p in known.values()):
        return (
            f"{kind} is called with {', '.join(asked)} and not told which experts a token is sent "
            "to with which weights, by which experts and their channels are ordered"
        )
    if not is_experts(experts):
        return (
            f"{kind} does not hold the weights of its experts as transformers lays them out for "
            "all of them (tensors of three axes that say whether they are transposed)"
        )
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    names = {up, "down_proj", *((f"{up}_bias", "down_proj_bias") if experts.has_bias else ())}
    if set(known) != names:
        strange = ", ".join(sorted(names.symmetric_difference(known)))
        return f"{kind} holds other tensors than its experts' usual ones: {strange}"
    if getattr(experts, "has_post_expert_norm", False):
        return f"{kind} has a norm behind each of its experts"
    return None


def _sizes(experts: Any) -> tuple[int, int]:
    """Experts and channels of each."""
    shape = experts.down_proj.shape
    return shape[0], shape[1 if experts.is_transposed else 2]


def _axes(experts: Any, each: tuple[int, ...]) -> Iterator[Axis]:
    out, into = (2, 1) if experts.is_transposed else (1, 2)
    parts: tuple[int, ...] = (1,)
    if experts.has_gate:  # side by side, or one half behind the other
        parts = (1, 1) if experts.is_concatenated else (2,)
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    for name, tensor in experts.named_parameters(recurse=False):
        yield Axis(name, "experts", 0, each)
        if name == up:
            yield Axis(name, "channels", out, parts)
        elif name == f"{up}_bias":
            yield Axis(name, "channels", 1, parts)
        elif name == "down_proj":
            yield Axis(name, "channels", into, (1,))
        else:
            assert tensor.dim() == 2, name


def _beside(model: nn.Module, above: str, number: int) -> tuple[Held, ...] | None:
    """What the block itself has for each expert, such as what corrects how they are chosen; None
    where that is more than a number for each."""
    tensors = _tensors(model.get_submodule(above), recurse=False)
    some = [held for held in _held(model.get_submodule(above), recurse=False)
            if number in held.shape]  # fmt: skip
    if any(len(held.shape) > 1 or not tensors[held.name].is_floating_point() for held in some):
        return None
    return tuple(replace(held, name=f"{above}.{held.name}" if above else held.name)
                 for held in some)  # fmt: skip


def _router(
    model: nn.Module, above: str, experts: str, number: int
) -> tuple[str, tuple[Held, ...]] | None:
    """Name of what has a row for every expert beside them, and its tensors that do; None if that
    cannot be told."""
    parent = model.get_submodule(above)
    found = []
    for key, module in parent.named_children():
        child = f"{above}.{key}" if above else key
        if child == experts or not ("gate" in key or "router" in key):
            continue
        if any(not tensor.is_floating_point() for tensor in _tensors(core(module)).values()):
            continue  # such as a table of which expert is whose
        rows = tuple(row for row in _held(core(module)) if number in row.shape)
        if any(len(row.shape) == 2 and row.shape[0] == number for row in rows):
            found.append((child, rows))
    if len(found) != 1 or any(row.shape.count(number) > 1 for row in found[0][1]):
        return None
    return found[0]


def _held(module: nn.Module, *, recurse: bool = True) -> list[Held]:
    """Its tensors."""
    linear = {
        f"{name}.{leaf}" if name else leaf
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        for leaf in ("weight", "bias")
    }
    parameters = dict(module.named_parameters(recurse=recurse))
    return [
        Held(name, tuple(tensor.shape), name in parameters, name in linear)
        for name, tensor in _tensors(module, recurse=recurse).items()
    ]


def _tensors(module: nn.Module, *, recurse: bool = True) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(recurse=recurse)),
        **dict(module.named_buffers(recurse=recurse)),
    }


def _config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # it has several
        return config


def _first(places: list[Any], names: tuple[str, ...]) -> int | None:
    """The first whole number that one of them has by one of the names."""
    values = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in values if type(value) is int), None)


def _linears(router: str | None, rows: tuple[Held, ...]) -> Iterator[tuple[str, str]]:
    """Linear layers of a router, which say how many rows they have."""
    for row in rows:
        if row.in_linear and len(row.shape) == 2:
            yield f"{router}.{row.name}".removesuffix(".weight"), "out_features"


def _saying(
    model: nn.Module, places: list[str], names: tuple[str, ...], value: int
) -> Iterator[tuple[str, str]]:
    for place in places:
        module = core(model.get_submodule(place))
        for name in names:
            if vars(module).get(name) == value:
                yield place, name
