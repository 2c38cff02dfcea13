"""A weight update as low-rank factors, one file per method, which `METHODS` names. Imports
`elastic.models`, `elastic.spaces` and what is below them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastic.adapters.base import Adapter
from elastic.adapters.lora import Lora
from elastic.adapters.olora import Olora
from elastic.adapters.prolora import Prolora
from elastic.adapters.sorsa import Sorsa
from elastic.adapters.soslora import SosLora
from elastic.errors import ConfigError

if TYPE_CHECKING:
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


def check(config: AdapterConfig, model: PreTrainedModel, space: BoundSpace) -> None:
    """ConfigError if the method cannot adapt a target layer or take a rank the space offers.

    Needs shapes only: `model` may be on the meta device.
    """
    name = config.resolved_method
    method = METHODS[name]
    for site in space.targets:
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


__all__ = ["METHODS", "Adapter", "check"]
