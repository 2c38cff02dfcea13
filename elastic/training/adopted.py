"""A super-adapter from an adapter that was trained elsewhere: its ranks sorted by what they do, the
channels of its model ordered, without a step of training. What its sub-adapters cut is made up for
as any other's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elastic.adapters.experts import as_they_lie
from elastic.config import TrainConfig
from elastic.config.adapter import NOTHING
from elastic.errors import ConfigError
from elastic.files import digest
from elastic.formats import peft
from elastic.models import loading
from elastic.models.modules import module_tree, plain_linear, put_
from elastic.spaces.targets import MATRIX
from elastic.supernet.compact import merged_weight
from elastic.supernet.supernet import Supernet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from elastic.spaces.declared import SearchSpace


Factors = Mapping[str, tuple[Tensor, Tensor]]
"""A (rank, in) and B (out, rank) by layer, (experts, ...) by matrix of all experts; scaled."""


def _folder(config: TrainConfig) -> Path | None:
    """Of the adapter; None where there is nothing to read."""
    taken = config.adapter.taken_from
    return None if taken in (None, NOTHING) else Path(str(taken))


def as_taken(config: TrainConfig) -> TrainConfig:
    """The settings with the adapter's own rank, at scale 1; RunError or ConfigError for an adapter
    that cannot be taken over. Reads no weights."""
    folder = _folder(config)
    rank = peft.lora_rank(folder) if folder else 1
    return replace(config, adapter=replace(config.adapter, rank=rank, alpha=float(rank)))


def origin(config: TrainConfig) -> dict[str, str]:
    """For a super-adapter's about.json."""
    folder = _folder(config)
    if folder is None:
        return {}
    return {
        "taken_from": str(config.adapter.taken_from),
        "taken_digest": f"sha256:{digest(folder / peft.PEFT_WEIGHTS)}",
    }


def adapted(space: SearchSpace, config: TrainConfig) -> SearchSpace:
    """The space with further adapted layers where the adapter has some; they keep their rank.
    ConfigError names one outside of its blocks. Reads no weights."""
    if config.adapter.taken_from is None:
        return space
    folder = _folder(config)
    return space.adapting(peft.lora_sites(folder) if folder else [], config.adapter.rank)


def factors_of(base: loading.Base, config: TrainConfig) -> Factors:
    """Of every layer that the adapter changes; a head that was trained along is put into the
    model. BaseMismatch for an adapter of another base."""
    folder = _folder(config)
    if folder is None:
        return {}
    return peft.read_lora(base.model, folder, config.model.path, base.digest)


@torch.no_grad()
def as_one(model: PreTrainedModel, factors: Factors) -> PreTrainedModel:
    """The model with its adapter merged, sharing what that leaves alone."""
    whole = module_tree(model)
    for site, (A, B) in factors.items():
        if A.dim() == MATRIX:
            experts: Any = model.get_submodule(site.rpartition(".")[0])
            lying = as_they_lie(A, B, experts.is_transposed)
            merged = merged_weight(model.get_parameter(site), *lying)
            put_(whole, site, nn.Parameter(merged, requires_grad=False))
            continue
        layer = model.get_submodule(site)
        bias = None if layer.bias is None else layer.bias.data
        whole.set_submodule(site, plain_linear(merged_weight(layer.weight, A, B), bias))
    return whole


@torch.no_grad()
def load_(net: Supernet, factors: Factors) -> None:
    """Put them into a supernet of LoRA whose channels are ordered: the leading ranks are those that
    matter most, and all of them are the update itself. ConfigError for a layer outside."""
    if strange := sorted(set(factors) - set(net.space.targets)):
        raise ConfigError(f"adapter.taken_from: {strange[0]} is no layer that the space adapts")
    state: dict[str, Tensor] = dict(net.head)
    for site, adapter in net.adapters():
        known = {name: torch.zeros_like(tensor) for name, tensor in adapter.state_dict().items()}
        if site in factors:
            A, B = sorted_ranks(*factors[site])
            rank = A.shape[-2]
            known["A"][..., :rank, :], known["B"][..., :rank] = A, B / adapter.scale
        state |= {f"{site}.{name}": tensor for name, tensor in known.items()}
    net.load_factors(state)
    for (site, axis), index in net.permutations().items():
        if (own := net.layer(site).adapter) is not None:
            own.reorder(axis, index)
    for name, mixture in net.mixtures.items():
        mixture.reorder_factors(*net.expert_orders(name))


def sorted_ranks(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same B A whose first ranks are its best approximation of that rank (Eckart and
    Young 1936), from the singular values of their triangular parts.

    Shapes: A (rank, in), B (out, rank), or of every expert; the rank stays.
    """
    left, upper = torch.linalg.qr(B.double())
    right, lower = torch.linalg.qr(A.mT.double())
    U, S, V = torch.linalg.svd(upper @ lower.mT)
    root = S.sqrt()[..., None, :]
    return (right @ V.mT * root).mT.to(A.dtype), (left @ U * root).to(B.dtype)
