"""Parameters that stand in several places of a model, such as embeddings that are the head too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from elastic.models.modules import put_

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def ends_of(model: nn.Module) -> Mapping[str, Sequence[str]]:
    """By the name of every parameter, all names that it has."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: ends for ends in names.values() for name in ends}


@torch.no_grad()
def untie_(model: nn.Module) -> None:
    """Give every place a parameter of its own, with the values that are there."""
    for name, ends in ends_of(model).items():
        if name != ends[0]:
            shared = model.get_parameter(name)
            put_(model, name, nn.Parameter(shared.clone(), shared.requires_grad))


def settle_ties_(model: PreTrainedModel) -> None:
    """Untie all, and say so in the configuration, where the ends of a tie have come to differ: a
    class ties all or none."""
    ends = ends_of(model)
    pairs = [pair for pair in model.all_tied_weights_keys.items() if set(pair) <= set(ends)]
    if all(name in ends[source] for name, source in pairs):
        return
    untie_(model)
    model.all_tied_weights_keys = {}
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
