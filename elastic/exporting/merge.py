"""Folds low-rank updates into base weights: the sub-adapter's own, and those of other adapters."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastic.adapters.experts import ElasticExperts, reordered
from elastic.adapters.layers import ElasticLinear
from elastic.config import MergeConfig
from elastic.errors import RunError
from elastic.exporting.foreign import Update
from elastic.models.modules import modules_of, plain_linear, put_
from elastic.models.quantised import QuantisedLinear
from elastic.models.ties import ends_of, settle_ties_
from elastic.spaces.bound import SubAdapter
from elastic.supernet.compact import part_, sliced, wide_type
from elastic.supernet.depth import renamed
from elastic.supernet.supernet import Supernet


@torch.no_grad()
def combine(
    net: Supernet,
    sub: SubAdapter,
    updates: Sequence[Update],
    config: MergeConfig,
    *,
    name: str = "sub-adapter",
    seed: int = 0,
    degree: float = 0.0,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """`sub` and other adapters in one model of plain layers, and what became of each.

    Updates are permuted like the base weights and cut to the sub-adapter's widths, a part `degree`
    of what is cut made up for; the strategy then combines them parameter by parameter. The report
    has, per adapter, the Frobenius norm of its full update, the share of the squared norm lost by
    cutting, and the cosines between the cut updates.
    """
    small = sliced(net, sub, degree)
    own = {name: (B @ A).to(wide_type(small.get_parameter(name)))
           for name, (A, B) in part_(small).items()}  # fmt: skip
    cut = [own, *(_cut(net, sub, update, degree) for update in updates)]
    weighted = [config.weight, *(entry.weight for entry in config.adapters)]
    weights = torch.tensor(weighted, dtype=torch.float64)
    tied, done = ends_of(small), set()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in dict.fromkeys(key for deltas in cut for key in deltas):
            if parameter in done:
                continue
            before = small.get_parameter(parameter)
            change = _combined([deltas.get(parameter) for deltas in cut], weights, config)
            after = (before.to(change.dtype) + change).to(before.dtype)
            alike = [end for end in tied[parameter] if _changed_alike(cut, parameter, end)]
            # The supernet's own tensor is left alone.
            merged = nn.Parameter(after, requires_grad=False)
            for end in alike:
                put_(small, end, merged)
            done.update(alike)
    settle_ties_(small)
    names = _distinct([name, *(update.name for update in updates)])
    report = {
        "strategy": config.strategy,
        "density": None if config.strategy == "linear" else config.density,
        "adapters": [
            {"name": names[0], "kind": net.adapter.resolved_method, "weight": config.weight,
             "norm": _norm(own), "lost_by_cutting": 0.0},
            *(
                {
                    "name": called,
                    "kind": update.kind,
                    "path": entry.path,
                    "weight": entry.weight,
                    "norm": (norm := _norm(update.deltas)),
                    "lost_by_cutting": 1 - (_norm(deltas) / norm) ** 2 if norm else 0.0,
                }
                for called, update, entry, deltas in zip(
                    names[1:], updates, config.adapters, cut[1:], strict=True
                )
            ),
        ],
        "cosine": {
            f"{names[i]} | {names[j]}": _cosine(cut[i], cut[j])
            for i in range(len(cut))
            for j in range(i)
        },
    }  # fmt: skip
    return small, report


def _cut(net: Supernet, sub: SubAdapter, update: Update, degree: float) -> dict[str, Tensor]:
    """The update in the supernet's channel order, at the sizes of `sub`; what is made up for of the
    weights is made up for of it."""
    kept, found = net.space.kept(sub), {}
    layers = dict(modules_of(net.model, ElasticLinear))
    with net.active(sub, degree):
        for name, delta in update.deltas.items():
            site, _, leaf = name.rpartition(".")
            if any(name in mixture.beside for mixture in net.mixtures.values()):
                raise RunError(
                    f"merge: {update.name} changes {name}, how experts are chosen; only what "
                    "changes their weights or a router's is merged"
                )
            layer, routed = layers.get(site), net.in_mixture(name)
            whole = _weight(net.model, name) if layer is None else getattr(layer.base, leaf)
            if routed:
                whole = routed[1].tensors()[routed[2]]
            if whole is None or whole.shape != delta.shape:
                raise RunError(
                    f"merge: {update.name} changes {name} by {tuple(delta.shape)}, the base model "
                    f"has {'no such parameter' if whole is None else tuple(whole.shape)}"
                )
            delta = _ordered(net, name, delta)
            left = renamed(kept, name)
            if left is None:
                continue
            if layer is not None:
                delta = layer.size.leading(delta)
                delta = layer.size.compensated_columns(delta) if leaf == "weight" else delta
            if routed:
                delta = routed[1].cut(routed[2], delta)
            found[left] = delta.to(whole.device)
    return found


def _ordered(net: Supernet, name: str, delta: Tensor) -> Tensor:
    """A parameter's change in the supernet's channel order."""
    if routed := net.in_mixture(name):
        experts, module, leaf = routed
        return reordered(delta, leaf, module.axes, *net.expert_orders(experts))
    site, _, leaf = name.rpartition(".")
    moved = net.permutations()
    if (site, "out") in moved:
        delta = delta[moved[site, "out"]]
    if (site, "in") in moved and leaf == "weight":
        delta = delta[:, moved[site, "in"]]
    return delta


def _combined(deltas: Sequence[Tensor | None], weights: Tensor, config: MergeConfig) -> Tensor:
    """One parameter's change; an adapter that leaves it alone counts as zero."""
    from peft.utils import merge_utils

    some = next(delta for delta in deltas if delta is not None)
    tensors = [torch.zeros_like(some) if delta is None else delta.to(some) for delta in deltas]
    weights = weights.to(some)
    if config.strategy == "linear":
        return merge_utils.task_arithmetic(tensors, weights)
    extra = {}
    if config.strategy.endswith("ties"):
        extra = {"majority_sign_method": config.majority_sign_method}
    return getattr(merge_utils, config.strategy)(tensors, weights, config.density, **extra)


def _changed_alike(cut: Sequence[Mapping[str, Tensor]], one: str, other: str) -> bool:
    """Whether every adapter does the same to both ends of a tie, up to the rounding of float32."""
    for deltas in cut:
        if one == other or (one not in deltas and other not in deltas):
            continue
        if one not in deltas or other not in deltas:
            return False
        a, b = deltas[one], deltas[other]
        if float((a - b).abs().max()) > 1e-6 * float(a.abs().max()):
            return False
    return True


@contextlib.contextmanager
def carrying(
    net: Supernet,
    sub: SubAdapter,
    updates: Sequence[Update],
    config: MergeConfig,
    degree: float = 0.0,
) -> Iterator[PreTrainedModel]:
    """The supernet with `sub` active on a base that carries every update whole, inside the block:
    what `combine` makes by the strategy linear, by another way."""
    with contextlib.ExitStack() as restored:
        for _, adapter in net.adapters():
            restored.callback(setattr, adapter, "scale", adapter.scale)
            adapter.scale *= config.weight
        for update, entry in zip(updates, config.adapters, strict=True):
            for name, delta in update.deltas.items():
                _carry(net, name, entry.weight * _ordered(net, name, delta), restored)
        yield restored.enter_context(net.active(sub, degree))


@torch.no_grad()
def _carry(net: Supernet, name: str, delta: Tensor, restored: contextlib.ExitStack) -> None:
    """Add to a parameter of the base, at this end of a tie alone, until all is restored."""
    site, _, leaf = name.rpartition(".")
    owner = net.model.get_submodule(site)
    # What was made up for is kept by the base that it is of.
    anew = isinstance(owner, ElasticLinear)
    if isinstance(owner, ElasticLinear | ElasticExperts):
        site, owner = f"{site}.base", owner.base
    before = getattr(owner, leaf)
    if anew or isinstance(owner, QuantisedLinear):  # a quantised one takes no other weight
        restored.callback(net.model.set_submodule, site, owner)
        owner = plain_linear(owner.weight, owner.bias)
        net.model.set_submodule(site, owner)
    else:
        restored.callback(setattr, owner, leaf, before)
    after = (before.to(delta.dtype) + delta.to(before.device)).to(before.dtype)
    setattr(owner, leaf, nn.Parameter(after, requires_grad=False))


def _weight(model: nn.Module, name: str) -> Tensor | None:
    """A parameter by its name, or the weight of a quantised layer, which is none."""
    site, _, leaf = name.rpartition(".")
    try:
        return getattr(model.get_submodule(site), leaf)
    except AttributeError:
        return None


def _distinct(names: Sequence[str]) -> list[str]:
    """The same, with numbers behind those that were there before: folders of one name are two."""
    found: list[str] = []
    for name in names:
        free = (f"{name} ({number})" for number in itertools.count(2))
        found.append(name if name not in found else next(n for n in free if n not in found))
    return found


def _norm(deltas: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(delta.double().pow(2).sum()) for delta in deltas.values()))


def _cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    dot = sum(float((one[name].double() * other[name].double()).sum())
              for name in one if name in other)  # fmt: skip
    norms = _norm(one) * _norm(other)
    return dot / norms if norms else 0.0
