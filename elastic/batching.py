"""Examples as tensors: left-padded, so that every answer ends at the right edge.

Encoder-decoder models take the prompt in the encoder and the answer in the decoder, both padded on
the right.

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
    """One tokenised example: ids of prompt and answer together, and how many are the answer; for
    an encoder-decoder model the prompt is `source` and the ids are the answer alone."""

    ids: tuple[int, ...]
    answer: int
    source: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return max(len(self.ids), len(self.source))


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, encoder_decoder: bool = False
) -> Encoded:
    """Prompt, a space, the answer and the end-of-sequence token, as ids."""
    head = tokenizer(prompt)["input_ids"]
    joined = answer if encoder_decoder else " " + answer
    tail = tokenizer(joined, add_special_tokens=False)["input_ids"]
    if not head or not tail:
        raise DataError(f"prompt {prompt!r} or answer {answer!r} has no tokens")
    tail = (*tail, tokenizer.eos_token_id)
    if encoder_decoder:
        return Encoded(tail, len(tail), tuple(head))
    return Encoded((*head, *tail), len(tail))


def collate(sequences: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    """int64 tensors: input_ids, attention_mask, labels, and position_ids of decoder-only models.

    Decoder-only: all (batch, length), left-padded. Labels are the ids at answer positions and -100
    elsewhere; padding is masked and the positions of real tokens start at 0, so what stands beside
    an example in its batch does not matter. Encoder-decoder: inputs (batch, source length), labels
    (batch, answer length), padded on the right.
    """
    if sequences[0].source:
        ids, mask = _right([sequence.source for sequence in sequences], pad)
        labels, real = _right([sequence.ids for sequence in sequences], pad)
        labels[real == 0] = IGNORED
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
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


def _right(rows: Sequence[tuple[int, ...]], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask, (rows, length)."""
    length = -(-max(map(len, rows)) // BUCKET) * BUCKET
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask


def answer_width(labels: Tensor) -> int:
    """Length of the longest answer in the batch: the last positions that matter."""
    return int((labels != IGNORED).sum(1).max())


def answer_logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (batch, width, vocabulary) that predict the labels (batch, width), float32 or wider;
    width is the longest answer."""
    labels = batch["labels"]
    if "position_ids" not in batch:  # encoder-decoder: the model shifts the labels itself
        logits = model(**batch, use_cache=False).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), labels
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
    order = sorted(range(len(sequences)), key=lambda i: -sequences[i].length)
    start = 0
    while start < len(order):
        length = -(-sequences[order[start]].length // BUCKET) * BUCKET
        rows = order[start : start + max(1, batch_tokens // length)]
        yield rows, [sequences[row] for row in rows]
        start += len(rows)
