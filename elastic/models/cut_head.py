"""A language-model head that computes the logits of some tokens alone. It needs torch and nothing
else: folders of models that have one get a copy of this file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class CutHead(nn.Linear):
    """Logits of the whole vocabulary: of the tokens that are kept what the head of all would
    compute, of the others minus infinity.

    Shapes: x (..., features) -> (..., vocabulary); weight (kept, features), bias (kept,), places
    (vocabulary,) int32: for every token its row, or the number of rows if it is cut.
    """

    places: Tensor

    def __init__(self, in_features: int, kept: int, vocabulary: int, bias: bool = False) -> None:
        super().__init__(in_features, kept, bias=bias)
        self.register_buffer("places", torch.zeros(vocabulary, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        # The last positions of several sequences are a view with gaps, which would be multiplied,
        # the whole weight read, once per sequence.
        kept = super().forward(x.contiguous())
        cut = kept.new_full((*kept.shape[:-1], 1), float("-inf"))
        return torch.cat([kept, cut], -1).index_select(-1, self.places)


def no_resizing(*_: Any, **__: Any) -> None:
    """Stands for a model's `resize_token_embeddings`, which would take the rows of a cut head for
    those of the first tokens, and say nothing: ValueError."""
    raise ValueError(
        "resize_token_embeddings: the head of this model computes some tokens alone, and its rows "
        "are not those of the first ones; add tokens to the full model"
    )
