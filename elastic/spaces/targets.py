"""What may carry factors: linear layers, and the matrices of all experts of a mixture."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from elastic.errors import ConfigError
from elastic.spaces.mixtures import DOWN, Axis, Mixture, mixtures

MATRIX = 3
"""Axes of a matrix of every expert."""


def linears_of(model: nn.Module) -> set[str]:
    """Names of its linear layers."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def matrices_of(model: nn.Module) -> dict[str, Mixture]:
    """The mixture of every matrix of all experts, by the matrix's name."""
    return {
        f"{mixture.experts}.{held.name}": mixture
        for mixture in mixtures(model)
        for held in mixture.tensors
        if len(held.shape) == MATRIX
    }


def require_known(
    sites: Sequence[str], known: Collection[str], where: str, kind: str = "linear layer"
) -> None:
    """ConfigError for the first that is not among the known."""
    missing = [site for site in sites if site not in known]
    if missing:
        raise ConfigError(f"{where}: {missing[0]!r} matches no {kind} of the model")


def is_transposed(mixture: Mixture) -> bool:
    """Whether the matrices of its experts lie (in, out)."""
    axes = (axis for axis in mixture.axes if axis.tensor == DOWN and axis.of == "channels")
    return next(axes).number == 1


def sizes_of(mixture: Mixture, tensor: str) -> tuple[int, int, int]:
    """Experts, output and input channels of each, of the matrices of this name."""
    count, rows, columns = next(held.shape for held in mixture.tensors if held.name == tensor)
    return (count, columns, rows) if is_transposed(mixture) else (count, rows, columns)


def factor_axes(mixture: Mixture, tensor: str) -> dict[str, tuple[Axis, ...]]:
    """What choices cut of the factors of a matrix, A (experts, rank, in) and B (experts, out,
    rank)."""
    found: dict[str, tuple[Axis, ...]] = {"A": (), "B": ()}
    for axis in mixture.axes:
        if axis.tensor != tensor:
            continue
        if axis.of == "experts":
            found = {name: (*axes, Axis(name, axis.of, 0, axis.parts))
                     for name, axes in found.items()}  # fmt: skip
        elif tensor == DOWN:
            found["A"] += (Axis("A", axis.of, 2, axis.parts),)
        else:
            found["B"] += (Axis("B", axis.of, 1, axis.parts),)
    return found
