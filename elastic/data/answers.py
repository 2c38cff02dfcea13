"""The answers of a batch: the logits that predict them, and the loss of a training step.

The head of a language model is a large part of a small model's work. With all answers at the right
edge, only the last few positions need logits, in training as in evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic.data.collating import IGNORED, answer_width
from elastic.models import compat
from elastic.models.kinds import Kind, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from elastic.data.prefix import Prefix


def answer_logits(
    model: torch.nn.Module,
    batch: dict[str, Tensor],
    width: int | None = None,
    prefix: Prefix | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (batch, width, vocabulary) that predict the labels (batch, width), float32 or wider;
    width is the longest answer, read from the labels unless given. The answer of a classifier is
    one token of a vocabulary of classes; a number has float labels and one logit. Of packed rows
    width is every position at which some row has an answer; the others' labels are ignored. With a
    prefix the sequences go on from it."""
    kind, labels = kind_of(model), batch["labels"]
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "segments")}
    if kind is Kind.CLASSIFIER:
        logits, labels = model(**inputs).logits.unsqueeze(1), labels.unsqueeze(1)
    elif "segments" in batch:
        answered = (labels != IGNORED).any(0).nonzero()[:, 0]
        logits = model(**inputs, logits_to_keep=answered - 1, use_cache=False).logits
        labels = labels[:, answered]
    elif kind is Kind.ENCODER_DECODER:  # the model shifts the labels itself
        logits = model(**batch, use_cache=False).logits
    else:
        width = answer_width(labels) if width is None else width
        labels = labels[:, -width:]
        if prefix or padding_is_seen(getattr(model, "module", model)):  # DDP and DeepSpeed wrap it
            logits = answers_of(model, batch, width, prefix)
        else:
            logits = model(**inputs, logits_to_keep=width + 1, use_cache=False).logits[:, :-1]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), labels


OVERFLOWING = (torch.float64, torch.float16)
"""Types whose lowest number, with a score added to it, may be -inf to a softmax in float32."""


def padding_is_seen(model: PreTrainedModel) -> bool:
    """Whether padding before the tokens would show in what the model says of them.

    Eager attention masks with the lowest number of the model's type and takes the softmax in
    float32. In bfloat16 and float32 an empty row, that of a padding token, becomes an average of
    all; in float64 it is -inf throughout, and so its softmax NaN; in float16 it may be. Padding is
    then NaN from the first block on, and 0 x NaN is NaN in the next one's sum over values.
    """
    eager = model.config._attn_implementation == "eager" and model.dtype in OVERFLOWING
    return kind_of(model) is Kind.RECURRENT or eager


def padded_behind(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A left-padded batch, all tensors (rows, length), with the padding on the right."""
    mask = batch["attention_mask"]
    index = (torch.arange(mask.shape[1], device=mask.device) + _padding(mask)) % mask.shape[1]
    return {name: tensor.gather(1, index) for name, tensor in batch.items()}


def answers_of(
    model: PreTrainedModel, batch: dict[str, Tensor], width: int, prefix: Prefix | None = None
) -> Tensor:
    """Logits (rows, width, vocabulary) that predict the last tokens of a left-padded batch; with a
    prefix, of rows that go on from it, each with at least one token before its answer."""
    mask = batch["attention_mask"]
    rows, length = mask.shape
    ids = padded_behind({"input_ids": batch["input_ids"], "attention_mask": mask})["input_ids"]
    before = torch.arange(length - width - 1, length - 1, device=mask.device)
    wanted, place = (before - _padding(mask)).clamp(min=0).unique(return_inverse=True)
    if kind_of(model) is Kind.RECURRENT:
        logits = model(ids, use_cache=False).logits[:, wanted]
    else:
        seen = prefix.length if prefix else 0
        # Padding gets the last of the positions, not one that the model may not have.
        positions = torch.arange(length, device=mask.device).clamp(max=mask.sum(1).max() - 1)
        cache = compat.given(model, prefix.cache) if prefix else {}
        logits = model(
            input_ids=ids,
            attention_mask=mask.new_ones(rows, seen + length),
            position_ids=(seen + positions).expand(rows, -1),
            logits_to_keep=wanted,
            use_cache=prefix is not None,
            **cache,
        ).logits
    return logits[torch.arange(rows, device=mask.device)[:, None], place]


def _padding(mask: Tensor) -> Tensor:
    """(rows, 1): how many positions of a row are padding."""
    return mask.shape[1] - mask.sum(1, keepdim=True)


def answer_loss(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None = None,
    distill: float = 0.0,
    kept: Tensor | None = None,
) -> Tensor:
    """Summed over answer tokens: (1 - distill) · cross-entropy + distill · KL(teacher ‖ model).

    The distribution of the teacher at temperature 1, on the same positions (in-place distillation:
    Yu et al. 2020, arXiv 2003.11142). Without a teacher the cross-entropy alone.

    Of numbers, whose labels are floating point, half the squared error to label and teacher.

    Shapes: logits and teacher (batch, length, vocabulary), labels (batch, length); kept are the
    flat places of answer tokens, read from the labels unless given.
    """
    if labels.is_floating_point():
        goal = labels[..., None].to(logits.dtype)
        soft = goal if teacher is None else teacher
        errors = [F.mse_loss(logits, each, reduction="sum") / 2 for each in (goal, soft)]
        return (1 - distill) * errors[0] + distill * errors[1]
    labels = labels.flatten()
    logits = logits.flatten(0, 1)
    hard = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    if teacher is None or distill == 0:
        return hard
    kept = labels != IGNORED if kept is None else kept
    soft = F.kl_div(
        F.log_softmax(logits[kept], -1),
        F.log_softmax(teacher.flatten(0, 1)[kept], -1),
        reduction="sum",
        log_target=True,
    )
    return (1 - distill) * hard + distill * soft
