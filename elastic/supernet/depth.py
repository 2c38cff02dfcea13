"""Depth: a model that runs some of its blocks and leaves the others out.

Blocks pass on what they add to, so a model without some of them still fits together. All of them
stay where they are and keep their names, so factors, checkpoints and wrappers find them; the code
of the model sees those that run, numbered anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from elastic.models.modules import modules_of
from elastic.spaces.blocks import NUMBERS, counts, described

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Blocks(nn.ModuleList):
    """All blocks of a stack, which looks like a list of those that run."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.running: tuple[int, ...] = ()
        super().__init__(blocks)
        self.running = tuple(range(len(blocks)))

    def __len__(self) -> int:
        return len(self.running)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self._modules[str(number)] for number in self.running)

    def __getitem__(self, index: int | slice) -> Any:
        return list(self)[index]


class Stack:
    """The blocks of one list, with all that says how many there are and of which kind each is."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.blocks = Blocks(list(model.get_submodule(name)))
        model.set_submodule(name, self.blocks)
        self._numbered = [
            [
                (module, name)
                for module in block.modules()
                for name in NUMBERS
                if isinstance(getattr(module, name, None), int)
            ]
            for block in self.blocks
        ]
        self._counts = counts(model, name, len(self.blocks))
        self._said = [(config, dict(vars(config))) for config, _ in self._counts]

    def run(self, kept: Sequence[int]) -> None:
        """Let the blocks in these places, ascending, run."""
        self.blocks.running = tuple(kept)
        for place, number in enumerate(self.blocks.running):
            for module, name in self._numbered[number]:
                setattr(module, name, place)
        full = len(self._numbered)
        for config, key in self._counts:
            setattr(config, key, len(kept))
        for config, values in self._said:
            for key, value in described(values, kept, full).items():
                setattr(config, key, value)


def settle_(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every list of which some blocks run by a plain one of those, in place."""
    for name, blocks in modules_of(model, Blocks):
        model.set_submodule(name, nn.ModuleList(list(blocks)))
    return model


def running(blocks: nn.ModuleList) -> dict[str, nn.Module]:
    """The blocks that run, by their names in the list."""
    names = blocks.running if isinstance(blocks, Blocks) else range(len(blocks))
    return {str(number): block for number, block in zip(names, blocks, strict=True)}


def renamed(kept: Mapping[str, Sequence[int]], name: str) -> str | None:
    """What a module, or its tensor, is called where only the blocks in these places of every list
    are left; None if it is gone."""
    for blocks, left in kept.items():
        if name.startswith(f"{blocks}."):
            number, dot, rest = name.removeprefix(f"{blocks}.").partition(".")
            if int(number) not in left:
                return None
            return f"{blocks}.{left.index(int(number))}{dot}{rest}"
    return name


def original(kept: Mapping[str, Sequence[int]], name: str) -> str:
    """What a module, or its tensor, was called before only these blocks were left: the inverse of
    `renamed`."""
    for blocks, left in kept.items():
        if name.startswith(f"{blocks}."):
            number, dot, rest = name.removeprefix(f"{blocks}.").partition(".")
            return f"{blocks}.{left[int(number)]}{dot}{rest}"
    return name


def states(inputs: tuple[Any, ...], given: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    """Hidden states (batch, ..., features) before and after a block, from what a forward hook is
    told."""
    before = inputs[0] if inputs else given["hidden_states"]
    return before, output[0] if isinstance(output, tuple) else output
