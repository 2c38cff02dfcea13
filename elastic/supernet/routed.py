"""What passes through the experts of a mixture on calibration batches: who gets a token, with which
weight, what comes out, and what their channels hold.

The family's own code is asked, with one expert per token at a time; what channels hold is read
through a last matrix that passes them on instead of mixing them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from elastic.adapters.experts import ElasticExperts
from elastic.spaces.mixtures import DOWN, EXPERT_WIDTH, core

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from elastic.spaces.bound import BoundSpace
    from elastic.supernet.watching import Watching


def widths_of(space: BoundSpace) -> dict[str, int]:
    """Channels of the experts whose width can be cut, by the name of their module and their place
    in it, as the supernet has them."""
    return {
        f"{name}.{place}": mixture.width
        for name, (mixture, groups) in space.mixtures.items()
        if EXPERT_WIDTH in groups
        for place in range(mixture.all_experts)
    }


def given(arguments: tuple[Any, ...], settings: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (tokens, hidden), experts and their weights (tokens, top k) of one call of a
    module of experts."""
    hidden, *rest = (*arguments, *settings.values())
    weights, chosen = sorted(rest[:2], key=lambda tensor: not tensor.is_floating_point())
    return hidden, chosen, weights


def outputs(
    experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """For every place of the top k: which expert each token is sent to, (tokens,), and what that
    one adds for it, (tokens, hidden)."""
    base, own = core(experts), whole(experts)
    for place in range(chosen.shape[1]):
        one = slice(place, place + 1)
        given = hidden, chosen[:, one], weights[:, one]
        yield chosen[:, place], functional_call(base, own, given)


def whole(experts: nn.Module) -> dict[str, Tensor]:
    """What its module computes with in full, where that is not what it holds: with factors."""
    if isinstance(experts, ElasticExperts) and experts.factors:
        return experts.at(experts.full)
    return {}


def channels(
    experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """For every place of the top k: which expert each token is sent to, (tokens,), and what its
    channels hold, times the weight, (tokens, channels)."""
    base, own = core(experts), whole(experts)
    down: Tensor = base.down_proj
    width = down.shape[1 if base.is_transposed else 2]
    eye = torch.eye(width, dtype=down.dtype, device=down.device)
    for place in range(chosen.shape[1]):
        one = slice(place, place + 1)
        pieces = []
        for start in range(0, width, hidden.shape[1]):  # as many as the output has room for
            passing = torch.zeros(hidden.shape[1], width, dtype=down.dtype, device=down.device)
            some = eye[start : start + hidden.shape[1]]
            passing[: len(some)] = some
            passing = passing.T if base.is_transposed else passing
            instead = {**own, DOWN: passing.expand(len(down), -1, -1)}
            if base.has_bias:
                instead["down_proj_bias"] = torch.zeros_like(base.down_proj_bias)
            got = functional_call(base, instead, (hidden, chosen[:, one], weights[:, one]))
            pieces.append(got[:, : len(some)])
        yield chosen[:, place], torch.cat(pieces, 1)


@contextlib.contextmanager
def told(
    watching: Watching, tell: Mapping[str, Callable[[Tensor, Tensor, Tensor], None]]
) -> Iterator[None]:
    """Inside the block, each function is told what the module of experts of its name gets, of real
    tokens alone (see `given`). The plain implementation computes, which knows every type."""

    asking: set[str] = set()  # those who are told ask the same module again

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
            if name not in asking:
                asking.add(name)
                tell[name](*(watching.tokens(name, each) for each in given(arguments, settings)))
                asking.remove(name)

        module = watching.model.get_submodule(name)
        return module.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(name) for name in tell]
    try:
        with plainly(watching.model) if tell else contextlib.nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def plainly(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the experts are computed one after another, by the code of the family."""
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
