"""Vocabulary: a head that computes the logits of some tokens, and minus infinity for the others.

No factors touch the head, so its rows are the base's, whatever is trained, and training uses all of
them. Nor is anything permuted: where the head is the embeddings, prompts are read as before, and
what is kept is a small matrix beside them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elastic.data.vocabulary import Sayable, sayable
from elastic.models.vocabulary import cut_head, put_head_

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from elastic.data.task import Example
    from elastic.models.cut_head import CutHead
    from elastic.spaces.bound import Group, SubAdapter
    from elastic.supernet.supernet import Supernet


def said_by(
    net: Supernet,
    tokenizer: PreTrainedTokenizerBase,
    sub: SubAdapter,
    examples: Sequence[Example],
) -> Sayable | None:
    """What of the answers to these examples `sub` can say; None where its head computes all
    tokens."""
    if net.vocabulary is None or not net.space.cuts_vocabulary(sub):
        return None
    group = net.vocabulary.group
    kept = net.vocabulary.tokens(sub[group.name])
    return sayable(tokenizer, net.model, examples, kept, group.choices[0])


class Vocabulary:
    """The head of one model, of which some rows are computed."""

    def __init__(self, model: PreTrainedModel, group: Group) -> None:
        self.group, self.model = group, model
        self.whole: nn.Linear = model.get_submodule(group.head)
        self.order = torch.arange(group.choices[0])
        """Tokens (vocabulary,), those that are kept longest first."""
        self._last: tuple[int, CutHead] | None = None

    def tokens(self, choice: int) -> Tensor:
        """The tokens that a choice keeps."""
        return self.order[:choice]

    def run(self, choice: int) -> None:
        """Let the head compute so many tokens."""
        if choice == self.group.choices[0]:
            self.model.set_submodule(self.group.head, self.whole)
            return
        like, last = self.whole.weight, self._last
        if last is None or last[0] != choice or not _alike(last[1].weight, like):
            last = self._last = choice, cut_head(self.whole, self.tokens(choice))
        self.model.set_submodule(self.group.head, last[1])

    def cut_(self, compact: PreTrainedModel, choice: int) -> PreTrainedModel:
        """A compact model, which has all tokens, with so many, in place."""
        if choice < self.group.choices[0]:
            head = compact.get_submodule(self.group.head)
            put_head_(compact, self.group.head, cut_head(head, self.tokens(choice)))
        return compact


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.device, one.dtype) == (other.device, other.dtype)
