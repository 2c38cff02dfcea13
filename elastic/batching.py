"""Examples as tensors: left-padded, so that every answer ends at the right edge.

The head of a language model is a large part of a small model's work. With all answers at the right
edge, only the last few positions need logits, in training as in evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elastic.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
BUCKET = 8
"""Lengths are rounded up to this: few distinct shapes let matrix kernels be reused."""


@dataclass(frozen=True)
class Encoded:
    """One tokenised example: ids of prompt and answer together, and how many are the answer."""

    ids: tuple[int, ...]
    answer: int


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> Encoded:
    """Prompt, a space, the answer and the end-of-sequence token, as ids."""
    head = tokenizer(prompt)["input_ids"]
    tail = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
    if not head or not tail:
        raise DataError(f"prompt {prompt!r} or answer {answer!r} has no tokens")
    return Encoded((*head, *tail, tokenizer.eos_token_id), len(tail) + 1)


def collate(sequences: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    """Left-padded int64 tensors (batch, length): input_ids, attention_mask, position_ids, labels.

    Labels are the ids at answer positions and -100 elsewhere; padding is masked and the positions
    of real tokens start at 0, so what stands beside an example in its batch does not matter.
    """
    longest = max(len(sequence.ids) for sequence in sequences)
    length = -(-longest // BUCKET) * BUCKET
    shape = (len(sequences), length)
    ids = torch.full(shape, pad)
    mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, sequence in enumerate(sequences):
        ids[row, length - len(sequence.ids) :] = torch.tensor(sequence.ids)
        mask[row, length - len(sequence.ids) :] = 1
        labels[row, length - sequence.answer :] = torch.tensor(sequence.ids[-sequence.answer :])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels
    }  # fmt: skip


def answer_width(labels: Tensor) -> int:
    """Length of the longest answer in the batch: the last positions that matter."""
    return int((labels != IGNORED).sum(1).max())


def answer_logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (batch, width, vocabulary) that predict the labels (batch, width), float32 or wider;
    width is the longest answer."""
    labels = batch["labels"]
    width = answer_width(labels)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, logits_to_keep=width + 1, use_cache=False).logits
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return logits, labels[:, -width:]


def length_sorted(
    sequences: Sequence[Encoded], batch_tokens: int
) -> Iterator[tuple[list[int], list[Encoded]]]:
    """Indices and sequences in batches of at most `batch_tokens` padded tokens (at least one
    sequence), longest first: memory runs out at once or not at all."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    start = 0
    while start < len(order):
        length = -(-len(sequences[order[start]].ids) // BUCKET) * BUCKET
        rows = order[start : start + max(1, batch_tokens // length)]
        yield rows, [sequences[row] for row in rows]
        start += len(rows)
