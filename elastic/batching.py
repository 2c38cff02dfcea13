"""Examples as tensors: left-padded, so that every answer ends at the right edge.

Encoder-decoder models take the prompt in the encoder and the answer in the decoder, both padded on
the right; classifiers take the text, padded on the right, and answer with the number of a class.

The head of a language model is a large part of a small model's work. With all answers at the right
edge, only the last few positions need logits, in training as in evaluation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Sampler

from elastic.behind import answers_of, padding_is_seen
from elastic.data.labels import number_in
from elastic.errors import DataError
from elastic.models.kinds import classes_of, has_types, is_number, longest_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from elastic.prefix import Prefix
    from elastic.tasks.base import Example

IGNORED = -100
_WORTH_A_PASS = 512
"""Tokens that a batch should have before short sequences are kept out of it."""


def padded(length: int) -> int:
    """The length rounded up to a multiple of 8, of 16 above 128, of 32 above 256, and so on: at
    most an eighth is padding from 64 up, and few distinct shapes let matrix kernels be reused."""
    step = step_of(length)
    return -(-length // step) * step


def step_of(length: int) -> int:
    """What padded lengths near this one are multiples of."""
    return 1 << max(3, (length - 1).bit_length() - 4)


@dataclass(frozen=True)
class Encoded:
    """One tokenised example: ids of prompt and answer together, and how many are the answer; for
    an encoder-decoder model the prompt is `source` and the ids are the answer alone; for a
    classifier the ids are the text and the answer is `label`."""

    ids: tuple[int, ...]
    answer: int
    source: tuple[int, ...] = ()
    types: tuple[int, ...] = ()
    """Of a classifier that tells two sentences apart: 0 for a token of the first, 1 of the
    second."""
    label: int | float | None = None
    """The number of its class; of a regression head the answer itself."""

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


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    example: Example,
    answer: str | None = None,
) -> Encoded:
    """With its answer, or another one, as this kind of model takes it."""
    answer = example.answer if answer is None else answer
    classes = classes_of(model)
    if not classes:
        if example.messages and not model.config.is_encoder_decoder:
            tail = (*tokenizer(answer, add_special_tokens=False)["input_ids"],
                    tokenizer.eos_token_id)  # fmt: skip
            return Encoded((*prompt_ids(tokenizer, example), *tail), len(tail))
        encoder_decoder = model.config.is_encoder_decoder
        return encode(tokenizer, example.text, answer, encoder_decoder=encoder_decoder)
    text = encode_text(tokenizer, model, example)
    if is_number(classes):
        return replace(text, label=number_in(answer))
    if answer not in classes:
        raise DataError(
            f"answer {answer!r} is none of the {len(classes)} classes that the model's head tells "
            f"apart: {', '.join(classes[:8])}"
        )
    return replace(text, label=classes.index(answer))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """What an answer is generated after: the prompt, or the conversation so far with the opening of
    the assistant's turn."""
    if not example.messages:
        return tokenizer(example.text)["input_ids"]
    if tokenizer.chat_template is None:
        raise DataError("task.prompt chat: the tokenizer of this model has no chat template")
    messages = [{"role": role, "content": content} for role, content in example.messages]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def encode_text(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, example: Example
) -> Encoded:
    """The ids of a text to be classified and, where the model has them, the types; what is longer
    than the model can read is cut."""
    prompt = example.text if example.messages else example.prompt
    found = tokenizer(
        prompt, example.second, truncation=True, max_length=most_tokens(model, tokenizer),
        return_token_type_ids=has_types(model),
    )  # fmt: skip
    if not found["input_ids"]:
        raise DataError(f"prompt {example.prompt!r} has no tokens")
    types = tuple(found.get("token_type_ids", ()))
    return Encoded(tuple(found["input_ids"]), 0, types=types)


def most_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Of a text to be classified: with the padding that it may get it has a position for each."""
    limit = longest_text(model, tokenizer)
    return limit - limit % step_of(limit)


def encode_all(
    tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example], model: PreTrainedModel
) -> list[Encoded]:
    """Every example with its answer."""
    return [encode_example(tokenizer, model, example) for example in examples]


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
        return {**batch, "labels": torch.tensor([sequence.label for sequence in sequences])}
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
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "segments")}
    if labels.dim() == 1:
        logits, labels = model(**inputs).logits.unsqueeze(1), labels.unsqueeze(1)
    elif "segments" in batch:
        answered = (labels != IGNORED).any(0).nonzero()[:, 0]
        logits = model(**inputs, logits_to_keep=answered - 1, use_cache=False).logits
        labels = labels[:, answered]
    elif "position_ids" not in batch:  # encoder-decoder: the model shifts the labels itself
        logits = model(**batch, use_cache=False).logits
    else:
        width = answer_width(labels) if width is None else width
        labels = labels[:, -width:]
        if prefix or padding_is_seen(getattr(model, "module", model)):  # DDP and DeepSpeed wrap it
            logits = answers_of(model, batch, width, prefix)
        else:
            logits = model(**inputs, logits_to_keep=width + 1, use_cache=False).logits[:, :-1]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), labels


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
