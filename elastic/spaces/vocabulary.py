"""How many rows of the language-model head are computed: the binding of the dimension `vocab`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from elastic.errors import ConfigError
from elastic.spaces.bound import Group
from elastic.spaces.dims import VOCABULARY, GroupSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CAPPED = "final_logit_softcapping"
"""Of configurations whose models bend logits behind the head, minus infinity into a number."""


def vocabulary(model: PreTrainedModel, spec: GroupSpec, where: str) -> Group:
    """The one group, named after the head; ConfigError for a model without one that can be cut.

    A choice below `least`, the tokens that the answers need, means those.
    """
    name, head = _head(model, where)
    full = head.out_features
    least = min(full, -(-spec.least // spec.align) * spec.align)
    sizes = {max(least, choice) for choice in spec.resolve(full, where)}
    choices = tuple(sorted(sizes, reverse=True))
    return Group(f"{name}.{spec.name}", VOCABULARY, choices, (), head=name)


def _head(model: PreTrainedModel, where: str) -> tuple[str, nn.Linear]:
    kind = type(model).__name__
    head = model.get_output_embeddings()
    if head is None:
        raise ConfigError(
            f"{where}: {kind} has no head with a row for every token (a classifier's has one for "
            "every class, and needs no cut); leave the group out"
        )
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"{where}: the head of {kind} is a {type(head).__name__}, not a linear layer; leave "
            "the group out"
        )
    if getattr(model.config.get_text_config(), CAPPED, None):
        raise ConfigError(
            f"{where}: {kind} bends its logits behind the head ({CAPPED}), so that those of cut "
            "tokens would be no minus infinity; leave the group out"
        )
    return next(name for name, each in model.named_modules() if each is head), head
