"""The loss of a training step: on answer tokens alone, from their labels and perhaps a teacher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from elastic.batching import IGNORED


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
