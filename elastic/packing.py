"""Several short sequences in one row, each of which sees itself alone.

transformers masks what belongs to other sequences where positions begin anew and no mask is given.
What is saved is padding; what it costs is that a row's answers stand anywhere, so that more
positions get logits than there are answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elastic.batching import IGNORED, Encoded, padded

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
