"""The dimensions that cut mixtures of experts: how many are kept, and how wide each is."""

from __future__ import annotations

from torch import nn

from elastic.errors import ConfigError
from elastic.spaces.dims import GroupSpec, Sites
from elastic.spaces.mixtures import EXPERT_WIDTH, EXPERTS, Mixture, mixture_at


def experts(model: nn.Module, block: str, spec: GroupSpec, max_rank: int) -> Sites:
    """How many experts of each block are kept, with the router's rows for them. ConfigError where
    what chooses among them is not known."""
    found = _all(model, block, spec)
    for mixture in found:
        if mixture.router is None or mixture.top_k is None:
            raise ConfigError(
                f"group {spec.name!r}: what sends tokens to {mixture.experts} is no module beside "
                "it with a row for each expert, so none can be left out; declare "
                f"`dim: {EXPERT_WIDTH}` instead"
            )
    full = _one(spec, {mixture.experts: mixture.count for mixture in found})
    least = max(mixture.least for mixture in found)
    return Sites(full, (), mixtures=found, least=least)


def expert_width(model: nn.Module, block: str, spec: GroupSpec, max_rank: int) -> Sites:
    """How many channels every expert of a block keeps, of each its own most important ones."""
    found = _all(model, block, spec)
    return Sites(_one(spec, {m.experts: m.width for m in found}), (), mixtures=found)


def _all(model: nn.Module, block: str, spec: GroupSpec) -> tuple[Mixture, ...]:
    found = []
    for each in spec.of:
        name = f"{block}.{each}"
        try:
            model.get_submodule(name)
        except AttributeError:
            raise ConfigError(f"group {spec.name!r}: {name!r} is no module of the model") from None
        try:
            found.append(mixture_at(model, name))
        except ConfigError as error:
            raise ConfigError(f"group {spec.name!r}: {error}") from None
    return tuple(found)


def _one(spec: GroupSpec, sizes: dict[str, int]) -> int:
    if len(set(sizes.values())) != 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(f"group {spec.name!r}: modules of one choice differ in size: {found}")
    return next(iter(sizes.values()))


EXPERT_DIMS = {EXPERTS: experts, EXPERT_WIDTH: expert_width}
"""Those that cut mixtures of experts; the others are in `elastic.spaces.dims`."""
