"""Cutting the head of a language model to the rows of some tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elastic.models.cut_head import CutHead, no_resizing
from elastic.models.modules import modules_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def cut_head(head: nn.Linear, tokens: Tensor) -> CutHead:
    """The rows of these tokens, (kept,) int64, in this order; the head is left as it is."""
    vocabulary, kept = head.out_features, len(tokens)
    with torch.device("meta"):
        cut = CutHead(head.in_features, kept, vocabulary, bias=head.bias is not None)
    rows = tokens.to("cpu" if head.weight.is_meta else head.weight.device)
    cut.weight = nn.Parameter(head.weight[rows], requires_grad=False)
    if head.bias is not None:
        cut.bias = nn.Parameter(head.bias[rows], requires_grad=False)
    places = torch.full((vocabulary,), kept, dtype=torch.int32, device=rows.device)
    places[rows] = torch.arange(kept, dtype=torch.int32, device=rows.device)
    cut.places = places
    return cut.eval()


def put_head_(model: PreTrainedModel, name: str, head: CutHead) -> None:
    """The head of this name in a model of its own, of whose embeddings it is no part any more."""
    model.set_submodule(name, head)
    tied = dict(model._tied_weights_keys or {})
    own = {k: v for k, v in tied.items() if not {k, v} & {f"{name}.weight", f"{name}.bias"}}
    kept: Any = model  # of the instance: what its class says is everybody's
    kept.resize_token_embeddings = no_resizing
    kept._tied_weights_keys = own
    kept.all_tied_weights_keys = {
        key: source
        for key, source in model.all_tied_weights_keys.items()
        if not {key, source} & {f"{name}.weight", f"{name}.bias"}
    }
    read_again = type(model.config).from_dict({**model.config.to_dict(), **UNTIED})
    if not read_again.tie_word_embeddings and not kept.all_tied_weights_keys:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


UNTIED = {"tie_word_embeddings": False}


def cut_head_of(model: nn.Module) -> str | None:
    """The name of the head that was cut; None of a model whose head computes all tokens."""
    return next((name for name, _ in modules_of(model, CutHead)), None)


def tokens_of(model: PreTrainedModel) -> int:
    """How many tokens it has logits for."""
    head: Any = model.get_output_embeddings()
    return len(head.places) if isinstance(head, CutHead) else int(head.weight.shape[0])
