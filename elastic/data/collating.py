"""Examples as tensors: left-padded, so that every answer ends at the right edge.

Encoder-decoder models take the prompt in the encoder and the answer in the decoder, both padded on
the right; classifiers take the text, padded on the right, and answer with the number of a class.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from elastic.data.encoding import Encoded, padded

IGNORED = -100
_WORTH_A_PASS = 512
"""Tokens that a batch should have before short sequences are kept out of it."""


def collate(sequences: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    """int64 tensors: input_ids, attention_mask, labels, and position_ids of decoder-only models.

    Decoder-only: all (batch, length), left-padded. Labels are the ids at answer positions and -100
    elsewhere; padding is masked and the positions of real tokens start at 0, so what stands beside
    an example in its batch does not matter. Encoder-decoder: inputs (batch, source length), labels
    (batch, answer length), padded on the right. Classifiers: inputs (batch, length), padded on the
    right, perhaps with token_type_ids, labels (batch,).
    """
    if sequences[0].label is not None:
        ids, mask = _right([sequence.ids for sequence in sequences], pad)
        batch = {"input_ids": ids, "attention_mask": mask}
        if sequences[0].types:
            batch["token_type_ids"], _ = _right([sequence.types for sequence in sequences], 0)
        labels = torch.tensor([sequence.label for sequence in sequences])
        if labels.is_floating_point():  # a number that is to be learnt is not one to be ignored
            labels[labels == IGNORED] = IGNORED + 1e-5
        return {**batch, "labels": labels}
    if sequences[0].source:
        ids, mask = _right([sequence.source for sequence in sequences], pad)
        labels, real = _right([sequence.ids for sequence in sequences], pad)
        labels[real == 0] = IGNORED
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    longest = max(len(sequence.ids) for sequence in sequences)
    length = padded(longest)
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
    length = padded(max(map(len, rows)))
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask


def answer_width(labels: Tensor) -> int:
    """Length of the longest answer in the batch: the last positions that matter."""
    return int((labels != IGNORED).sum(1).max())


def collated(
    sequences: Sequence[Encoded], size: int, pad: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Batches of so many, in the order given, on the device."""
    for start in range(0, len(sequences), size):
        batch = collate(sequences[start : start + size], pad)
        yield {key: value.to(device) for key, value in batch.items()}


def length_sorted(
    sequences: Sequence[Encoded], batch_tokens: int
) -> Iterator[tuple[list[int], list[Encoded]]]:
    """Indices and sequences in batches of at most `batch_tokens` padded tokens (at least one
    sequence), longest first: memory runs out at once or not at all. What would be padding to more
    than an eighth waits for the next batch, once this one is worth a forward pass."""
    order = sorted(range(len(sequences)), key=lambda i: -sequences[i].length)
    start = 0
    while start < len(order):
        length = padded(sequences[order[start]].length)
        rows = order[start : start + max(1, batch_tokens // length)]
        least = -(-_WORTH_A_PASS // length)
        similar = [row for row in rows[least:] if sequences[row].length >= length * 7 / 8]
        rows = rows[:least] + similar
        yield rows, [sequences[row] for row in rows]
        start += len(rows)


class SimilarLengths(Sampler[int]):
    """The order of an epoch in which examples of similar length stand together.

    Shuffled, then sorted by length within windows of `_WINDOW` steps, whose steps are shuffled
    again: little padding, still another mixture in every epoch. A function of seed and epoch, so
    a resumed run needs no generator state; `step` examples make one optimiser step, over all
    processes, so their number does not change what a step sees. What is left over comes last.
    """

    _WINDOW = 32

    def __init__(
        self, lengths: Sequence[int], step: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        self.lengths, self.step, self.seed, self.epoch = lengths, step, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self.seed}/epoch/{self.epoch()}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        whole = len(order) - len(order) % self.step
        steps: list[list[int]] = []
        for start in range(0, whole, self.step * self._WINDOW):
            window = order[start : min(whole, start + self.step * self._WINDOW)]
            window.sort(key=lambda index: padded(self.lengths[index]))
            steps += [window[i : i + self.step] for i in range(0, len(window), self.step)]
        generator.shuffle(steps)
        yield from (index for step in steps for index in step)
        yield from order[whole:]


DIFFERENCE = 0.1
"""Of the logits, in norm, that rounding may explain in any type."""


def rows_of(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which sequences share a row of `room` tokens: the longest first, each into the first row that
    has room (first fit decreasing: at most 11/9 of the fewest rows, and one more; Johnson 1973)."""
    rows: list[list[int]] = []
    left: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = next((i for i, free in enumerate(left) if free >= lengths[number]), len(rows))
        if place == len(rows):
            rows.append([])
            left.append(room)
        rows[place].append(number)
        left[place] -= lengths[number]
    return rows


def pack(sequences: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    """The fewest rows as long as the longest sequence, padded, that hold all; see `in_rows`."""
    lengths = [len(sequence.ids) for sequence in sequences]
    longest = padded(max(lengths))
    return in_rows(sequences, rows_of(lengths, longest), longest, pad)


def in_rows(
    sequences: Sequence[Encoded], rows: Sequence[Sequence[int]], length: int, pad: int
) -> dict[str, Tensor]:
    """int64 tensors (rows, length): input_ids, labels, position_ids that begin anew with every
    sequence, and segments, the number of a token's sequence in its row from 1 up, 0 of padding."""
    shape = (len(rows), length)
    batch = {
        "input_ids": torch.full(shape, pad), "labels": torch.full(shape, IGNORED),
        "position_ids": torch.zeros(shape, dtype=torch.int64),
        "segments": torch.zeros(shape, dtype=torch.int64),
    }  # fmt: skip
    for row, numbers in enumerate(rows):
        start = 0
        for segment, number in enumerate(numbers, 1):
            ids, answer = torch.tensor(sequences[number].ids), sequences[number].answer
            end = start + len(ids)
            batch["input_ids"][row, start:end] = ids
            batch["labels"][row, end - answer : end] = ids[-answer:]
            batch["position_ids"][row, start:end] = torch.arange(len(ids))
            batch["segments"][row, start:end] = segment
            start = end
    return batch
