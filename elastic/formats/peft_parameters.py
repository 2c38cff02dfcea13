"""How PEFT lays out the factors of matrices of all experts (`target_parameters`, its
`ParamWrapper`).

lora_A holds the ranks of one expert after another, (experts * rank, in); lora_B the experts of one
rank after another, (out, rank * experts). Of several matrices in one module the wrapper of each
stands around that of the one before, in the order of the module's parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

INSIDE = ".base_layer"
"""Behind the name of a wrapper, what it stands around."""


def as_stored(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of factors (experts, rank, in) and (experts, out, rank)."""
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def as_factors(lora_A: Tensor, lora_B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The inverse."""
    return lora_A.unflatten(0, (experts, -1)), lora_B.unflatten(1, (-1, experts)).permute(2, 0, 1)


def stored_names(
    module: str, parameters: Sequence[str], adapted: Collection[str]
) -> dict[str, str]:
    """By adapted parameter of a module of experts, what PEFT calls the wrapper in its file."""
    order = [name for name in parameters if name in adapted]
    return {name: module + INSIDE * (len(order) - 1 - place) for place, name in enumerate(order)}


def sites_of(stored: Sequence[str], parameters: Sequence[str]) -> list[str]:
    """The layers and parameters that an adapter changes, from what its file calls them and the
    parameters that it names."""
    found = []
    for name in dict.fromkeys(each.replace(INSIDE, "") for each in stored):
        leaves = {target.rpartition(".")[2] for target in parameters}
        own = [leaf for leaf in sorted(leaves) if _is_named(f"{name}.{leaf}", parameters)]
        found += [f"{name}.{leaf}" for leaf in own] if own else [name]
    return found


def _is_named(parameter: str, targets: Sequence[str]) -> bool:
    return any(f".{parameter}".endswith(f".{target}") for target in targets)


def targets_of(model: nn.Module, sites: Collection[str]) -> list[str]:
    """Parameters as PEFT matches them: by their last two names, unless others have those too."""

    def ending(name: str) -> str:
        return ".".join(name.split(".")[-2:])

    short = {ending(site) for site in sites}
    names = (name.replace(".base.", ".") for name, _ in model.named_parameters())
    alike = {name for name in names if ending(name) in short}
    return sorted(short) if alike == set(sites) else sorted(sites)
