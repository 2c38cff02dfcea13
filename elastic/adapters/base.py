"""The contract every adapter method keeps: a weight update is a pair of low-rank factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from elastic.config import AdapterConfig
from elastic.errors import RunError


class Adapter(nn.Module):
    """One layer's update, ΔW = B A relative to the base weight, usable at any rank to `max_rank`.

    What a method owns is how its parameters become factors, how they start, and what regularises
    them. Forward passes, slicing, merging and every export are written once, against `factors`.

    Constructed with sizes alone, so that saved factors can be loaded without the base weight;
    `start` initialises for training.
    """

    along_in: ClassVar[Mapping[str, int]] = {"A": 1}
    """Tensors with an axis of input channels, and which axis that is."""
    along_out: ClassVar[Mapping[str, int]] = {"B": 0}
    """The same for output channels."""
    fast: ClassVar[Sequence[str]] = ("B",)
    """Parameters on the output side, whose learning rate is `lr_ratio` times the others'."""
    clip_penalty: ClassVar[bool] = True
    """Whether the penalty's gradient is clipped with the task's, or added after clipping."""
    dropout_on_rank: bool = False
    """Whether dropout acts on A x instead of x."""
    scale: float
    """A number that multiplies the whole update: inside B in `factors`, not in `unscaled`."""

    def __init__(
        self, config: AdapterConfig, out_features: int, in_features: int, **factory: Any
    ) -> None:
        super().__init__()
        self.max_rank, self.scale = config.rank, config.scale

    @classmethod
    def refuse(cls, config: AdapterConfig, out_features: int, in_features: int) -> str | None:
        """Why this method cannot adapt a layer of these sizes; None if it can."""
        return None

    @classmethod
    def refuse_rank(cls, config: AdapterConfig, rank: int) -> str | None:
        """Why a sub-adapter cannot have this rank; None if it can."""
        return None

    def start(self, weight: Tensor, generator: torch.Generator) -> None:
        """Initialise for training on a base weight (out_features, in_features); ΔW becomes 0."""
        raise NotImplementedError

    def unscaled(self, rank: int) -> tuple[Tensor, Tensor]:
        """A (factor rank, in_features) and B (out_features, factor rank): ΔW = scale · B A.

        Methods nest: the factors at a rank are the leading rows and columns of those at any
        larger one. The factor rank is what a plain LoRA of this update needs. A full rank must
        not be sliced: every slice is a padded gradient later.
        """
        raise NotImplementedError

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The same with every scale inside B. Forward passes scale what is smaller than B."""
        A, B = self.unscaled(rank)
        return A, B if self.scale == 1 else self.scale * B

    def penalty(self, rank: int) -> Tensor | None:
        """This layer's regulariser on its active ranks, weighted; None if there is none now."""
        return None

    @staticmethod
    def total(penalties: Sequence[Tensor], learning_rate: float) -> Tensor:
        """The model's regulariser from its layers'; `learning_rate` is the configured one."""
        return torch.stack(list(penalties)).sum()

    def advance(self, step: int, steps: int) -> None:
        """Set what follows a schedule; `step` counts finished optimiser steps of `steps`."""

    @torch.no_grad()
    def reorder(self, axis: str, index: Tensor) -> None:
        """Follow a permutation of the layer's channels on `axis` ("out" or "in"), in place."""
        for name, dim in (self.along_out if axis == "out" else self.along_in).items():
            tensor = getattr(self, name)
            tensor.copy_(tensor.index_select(dim, index.to(tensor.device)))

    def shapes(self, state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """What `verify` wants of each tensor in `state`."""
        return {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}

    def verify(self, state: Mapping[str, Tensor], where: str = "factors") -> None:
        """RunError names what is missing, strange, misshapen or NaN in a `state_dict`."""
        wanted = self.shapes(state)
        if strange := sorted(set(wanted).symmetric_difference(state)):
            verb = "is missing" if strange[0] in wanted else "is unknown to this method"
            raise RunError(f"{where}.{strange[0]} {verb} ({len(strange)} tensors differ)")
        for name, shape in wanted.items():
            if tuple(state[name].shape) != shape:
                raise RunError(
                    f"{where}.{name} is {tuple(state[name].shape)}, the model wants {shape}"
                )
            if not torch.isfinite(state[name]).all():
                raise RunError(f"{where}.{name} holds NaN or infinite values; train it again")

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`, after `verify`."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])

    def succeed(self, state: Mapping[str, Tensor], generator: torch.Generator) -> None:
        """Begin the next task of a sequence after the one that ended with `state`."""
        self.load(state)


def kaiming_(tensor: Tensor, in_features: int, generator: torch.Generator) -> None:
    """Uniform on ±1/√in_features: PyTorch's and PEFT's Kaiming start with slope √5."""
    uniform = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
    with torch.no_grad():
        tensor.copy_((2 * uniform - 1) / math.sqrt(in_features))
