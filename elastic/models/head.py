"""Models that answer with a class, or a number: an encoder, or a decoder, with such a head.

The head, and the pooler that some encoders have below it, is trained whole, beside the factors, and
is small. What of it was not saved for these very classes starts anew.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from elastic.config.model import SCORE
from elastic.errors import ConfigError, ModelError
from elastic.models.kinds import POOLER, Kind, classes_of, is_number, kind_of, was_trained

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def describe_(architecture: PretrainedConfig, classes: Sequence[str]) -> bool:
    """Put the classes into a model's configuration; whether its saved head is theirs. Classes that
    differ in case alone, or are the numbers of unnamed ones, are the same in the saved order.
    ConfigError without any."""
    if not classes:
        raise ConfigError("model.classes: name what the classification head is to tell apart")
    saved = [architecture.id2label[number] for number in sorted(architecture.id2label)]
    own = {name.casefold(): name for name in classes}
    known: Sequence[str | None] = [
        own.get(name.casefold(), own.get(name.removeprefix("LABEL_"))) for name in saved
    ]
    if is_number(classes):
        known, architecture.problem_type = SCORE, "regression"
    kept = was_trained(architecture) and len(saved) == len(classes) and None not in known
    names = known if kept else classes
    architecture.id2label = dict(enumerate(names))
    architecture.label2id = {name: number for number, name in enumerate(names)}
    if architecture.pad_token_id is None:  # a decoder looks for the end of its text by this one
        end = architecture.eos_token_id
        architecture.pad_token_id = end[0] if isinstance(end, list) else end
    return kept


def head_of(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Its parameters by name, those of a pooler below it among them; none of a language model."""
    if kind_of(model) is not Kind.CLASSIFIER:
        return {}
    body = f"{model.base_model_prefix}."
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.startswith(body) or name.startswith(f"{body}{POOLER}.")
    }


@torch.no_grad()
def start_head_(model: PreTrainedModel, missing: Collection[str], seed: int) -> None:
    """New values for what was not saved, or for other classes: weights normal with the family's own
    deviation, norms 1, biases 0. ModelError when the model below the head lacks something."""
    head = head_of(model)
    if below := sorted(set(missing) - set(head)):
        raise ModelError(
            f"{len(below)} weights of {type(model).__name__} are missing or of another shape: "
            f"{', '.join(below[:3])}; give the whole model"
        )
    generator = torch.Generator().manual_seed(seed)
    deviation = getattr(model.config, "initializer_range", 0.02)
    for name, parameter in head.items():
        start = torch.zeros(parameter.shape)
        if parameter.dim() > 1:
            start.normal_(0, deviation, generator=generator)
        elif name.endswith("weight"):
            start.fill_(1)
        if name in missing:
            parameter.copy_(start)


def last_layer(model: PreTrainedModel) -> set[str]:
    """The parameters of the head that have a row for every class."""
    count = len(classes_of(model))
    return {name for name, p in head_of(model).items() if POOLER not in name and len(p) == count}


def widen_head_(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """The head in this type, to be trained, whatever type its inputs come in."""
    for name, parameter in head_of(model).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(parameter.to(dtype)))
    for owner in {name.rpartition(".")[0] for name in head_of(model)}:
        model.get_submodule(owner).register_forward_pre_hook(_widened)
    return head_of(model)


def _widened(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x.to(next(module.parameters()).dtype) for x in inputs)
