"""What a sub-adapter costs once merged: parameters and operations, by counting."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import nn

from elastic.adapters.experts import ExpertFactors
from elastic.adapters.layers import ElasticLinear
from elastic.models.modules import modules_of
from elastic.models.quantised import QuantisedLinear
from elastic.models.ties import ends_of
from elastic.models.wrappers import is_in, outside
from elastic.spaces.bound import BoundSpace, SubAdapter
from elastic.spaces.mixtures import EXPERT_WIDTH, EXPERTS, Mixture, mixtures


@dataclass(frozen=True)
class Cost:
    """What a model of some size takes."""

    params: int
    """Elements of all distinct parameters, however many bits each takes."""
    macs: int
    """Multiply-accumulates of the linear layers per token of text, the head included; of the
    experts of a mixture those that a token is sent to."""
    active_params: int
    """Parameters without those of experts that a token is not sent to."""


def count(model: nn.Module) -> Cost:
    """Of a plain model, as it stands."""
    elsewhere = outside(model)
    macs = sum(
        layer.in_features * layer.out_features
        for name, layer in modules_of(model, nn.Linear)
        if not is_in(name, elsewhere)
    )
    packed = modules_of(model, QuantisedLinear)  # whose weights are not parameters
    params = sum(layer.shape.numel() for _, layer in packed)
    params += sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for mixture in mixtures(model):
        if is_in(mixture.experts, elsewhere):
            continue
        of_experts = _of_experts(mixture, linear=False)
        macs += of_experts.macs
        idle += of_experts.params - of_experts.active_params
    return Cost(params, macs, params - idle)


def _of_experts(
    mixture: Mixture, experts: int | None = None, channels: int | None = None, *, linear: bool
) -> Cost:
    """Of so many experts of each group, all of them unless given, and of the router's rows for
    them; those of linear layers are counted as such, unless `linear`."""
    held = mixture.elements(experts, channels, linear=linear)
    there = (mixture.count if experts is None else experts) * mixture.groups
    sent = there if mixture.top_k is None else min(there, mixture.top_k)
    whole = held.matrices + held.vectors
    return Cost(
        whole + held.router,
        held.matrices * sent // there + held.router_matrices,
        whole * sent // there + held.router,
    )


class Counter:
    """Cost of any sub-adapter, from the layer shapes alone: 50 µs instead of slicing a model."""

    def __init__(self, model: nn.Module, space: BoundSpace) -> None:
        """`model` is plain or carries elastic layers; meta tensors will do."""
        self.space = space
        self.full = _without_factors(model)
        self.blocks = {
            f"{block}.": _without_factors(model.get_submodule(block))
            for group in space.depths
            for block in group.blocks
        }
        self.cuts = [
            (site, int(axis == "in"), group.name, group.choices[0])
            for (site, axis), cuts in space.axes.items()
            for group, _ in cuts
        ]
        self.shapes: dict[str, tuple[int, int, bool]] = {}
        for site in {site for site, _ in space.axes}:
            layer: Any = model.get_submodule(site)
            layer = layer.base if isinstance(layer, ElasticLinear) else layer
            self.shapes[site] = (layer.out_features, layer.in_features, layer.bias is not None)
        self.mixtures = [
            (mixture, groups.get(EXPERTS), groups.get(EXPERT_WIDTH))
            for mixture, groups in space.mixtures.values()
        ]
        self.head: tuple[int, int, int] | None = None
        """Columns and biases of a head that may be cut, and how many of its parameters stand
        elsewhere, too: those of embeddings."""
        if group := space.vocabulary:
            layer, ends = model.get_submodule(group.head), ends_of(model)
            own = layer.named_parameters(prefix=group.head)
            shared = sum(tensor.numel() for name, tensor in own if len(ends[name]) > 1)
            self.head = layer.in_features, int(layer.bias is not None), shared

    def __call__(self, sub: SubAdapter) -> Cost:
        kept = {site: [rows, columns] for site, (rows, columns, _) in self.shapes.items()}
        chosen = sub.as_dict()
        for site, axis, name, full in self.cuts:
            kept[site][axis] = kept[site][axis] * chosen[name] // full
        gone = self.space.left_out(sub)
        weights = biases = 0
        for site, (rows, columns, has_bias) in self.shapes.items():
            if not site.startswith(gone):
                weights += rows * columns - kept[site][0] * kept[site][1]
                biases += has_bias * (rows - kept[site][0])
        if self.head and (group := self.space.vocabulary) and self.space.cuts_vocabulary(sub):
            columns, with_bias, shared = self.head
            gone_rows = group.choices[0] - sub[group.name]
            weights += gone_rows * columns
            # What is shared stays, and what is kept of the head stands beside it.
            biases += gone_rows * with_bias - shared
        less = [Cost(weights + biases, weights, weights + biases)]
        less += [self.blocks[block] for block in gone]
        for mixture, experts, channels in self.mixtures:
            if not mixture.experts.startswith(gone):
                whole = _of_experts(mixture, linear=True)
                left = _of_experts(
                    mixture,
                    chosen[experts.name] if experts else None,
                    chosen[channels.name] if channels else None,
                    linear=True,
                )
                less.append(_less(whole, left))
        return functools.reduce(_less, less, self.full)


def _less(one: Cost, other: Cost) -> Cost:
    return Cost(
        one.params - other.params,
        one.macs - other.macs,
        one.active_params - other.active_params,
    )


def _without_factors(model: nn.Module) -> Cost:
    adapters = [layer.adapter for _, layer in modules_of(model, ElasticLinear) if layer.adapter]
    adapters += [factors.adapter for _, factors in modules_of(model, ExpertFactors)]
    extra = sum(p.numel() for adapter in adapters for p in adapter.parameters())
    whole = count(model)
    return Cost(whole.params - extra, whole.macs, whole.active_params - extra)
