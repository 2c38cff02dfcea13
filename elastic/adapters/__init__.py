"""A weight update as low-rank factors, one file per method, which `METHODS` names. Imports
`elastic.models`, `elastic.spaces` and what is below them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastic.adapters.base import Adapter
from elastic.adapters.lora import ExpertLora, Lora
from elastic.adapters.olora import Olora
from elastic.adapters.prolora import Prolora
from elastic.adapters.sorsa import Sorsa
from elastic.adapters.soslora import SosLora
from elastic.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from elastic.config import AdapterConfig
    from elastic.config.adapter import Method
    from elastic.spaces.bound import BoundSpace

METHODS: dict[Method, type[Adapter]] = {
    "lora": Lora,
    "sorsa": Sorsa,
    "prolora": Prolora,
    "olora": Olora,
    "soslora": SosLora,
}
ROUTED: dict[Method, type[ExpertLora]] = {"lora": ExpertLora}
"""Those for matrices of all experts, a pair of factors for each."""


def method_for(name: Method, shape: Sequence[int]) -> type[Adapter] | None:
    """For a linear layer (out, in), or a matrix of all experts (experts, out, in); made of settings
    and these sizes. None where the method has no factors for it."""
    return (METHODS if len(shape) == 2 else ROUTED).get(name)


def check(config: AdapterConfig, model: PreTrainedModel, space: BoundSpace) -> None:
    """ConfigError if the method cannot adapt a target layer or take a rank the space offers.

    Needs shapes only: `model` may be on the meta device.
    """
    name = config.resolved_method
    method = METHODS[name]
    for site in space.targets:
        if space.experts_of(site):
            _check_experts(config, site)
            continue
        layer = model.get_submodule(site)
        if reason := method.refuse(config, layer.out_features, layer.in_features):
            raise ConfigError(f"{site}: {name}: {reason}; choose a smaller adapter.rank")
    for group in space:
        for choice in group.choices if group.dim == "rank" else ():
            if reason := method.refuse_rank(config, choice):
                raise ConfigError(
                    f"group {group.name!r}: {name}: {reason}; "
                    "change its choices in the search space"
                )


def _check_experts(config: AdapterConfig, site: str) -> None:
    name = config.resolved_method
    if name not in ROUTED:
        raise ConfigError(
            f"{site}: {name} has no factors for matrices of all experts; leave it out of adapt, or "
            f"choose adapter.method {' or '.join(ROUTED)}"
        )
    if config.dropout:
        raise ConfigError(
            f"{site}: adapter.dropout {config.dropout:g} drops inputs of factors, and those of "
            "experts are added to weights; leave it out of adapt, or give --adapter.dropout 0"
        )


__all__ = ["METHODS", "ROUTED", "Adapter", "check", "method_for"]
