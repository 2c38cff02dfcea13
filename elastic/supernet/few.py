"""A model of many blocks with a few of each kind: what those do, all of them do."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from elastic.adapters.experts import ElasticExperts, ExpertFactors
from elastic.adapters.layers import ElasticLinear
from elastic.models.modules import instead, outermost
from elastic.spaces.blocks import NUMBERS, counts, described, settings_of
from elastic.supernet.depth import running

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEW = 2
"""The first block is none of the rest: what enters it has no gradient."""


def alike(model: nn.Module) -> list[list[str]]:
    """Names of blocks in one list that compute the same, where they are many."""
    kinds: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, blocks in outermost(model, nn.ModuleList):
        for number, block in running(blocks).items():
            kinds[(name, *_signature(block))].append(f"{name}.{number}")
    return [kind for kind in kinds.values() if len(kind) > 2 * FEW + 1]


def _signature(block: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Classes, shapes, active sizes and plain settings of everything in a block, but its number."""
    for name, module in block.named_modules():
        settings = settings_of(module)
        if isinstance(module, ElasticLinear):
            size = module.size
            settings |= {"active": (size.rows, size.columns, size.rank)}
        if isinstance(module, ElasticExperts):
            settings |= {"active": (module.size.experts, module.size.channels)}
        if isinstance(module, ExpertFactors):
            settings |= {"active": module.size.rank}
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        shapes = tuple((key, tensor.shape, tensor.dtype) for key, tensor in tensors)
        yield name, type(module), tuple(sorted(settings.items(), key=str)), shapes


@contextlib.contextmanager
def without(model: PreTrainedModel, left_out: Sequence[str]) -> Iterator[None]:
    """The model as if these blocks were not there: its configuration and the numbers of the others
    say so, too."""
    lists = {name.rpartition(".")[0] for name in left_out}
    few: dict[str, nn.Module] = {}
    before: list[tuple[Any, dict[str, Any]]] = []

    def change(thing: Any, values: dict[str, Any]) -> None:
        before.append((thing, {key: vars(thing)[key] for key in values}))
        vars(thing).update(values)

    for name in lists:
        blocks: Any = model.get_submodule(name)
        numbers, own = zip(*running(blocks).items(), strict=True)
        kept = [at for at, number in enumerate(numbers) if f"{name}.{number}" not in left_out]
        for config, key in counts(model, name, len(own)):
            change(config, {key: len(kept), **described(vars(config), kept, len(own))})
        for place, at in enumerate(kept):
            for module in own[at].modules():
                numbered = (n for n in NUMBERS if isinstance(vars(module).get(n), int))
                change(module, dict.fromkeys(numbered, place))
        few[name] = nn.ModuleList([own[at] for at in kept])
    try:
        with instead(model, few):
            yield
    finally:
        for thing, values in reversed(before):
            vars(thing).update(values)
