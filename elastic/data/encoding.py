"""Examples as tokens: prompt and answer as each kind of model takes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from elastic.console import track
from elastic.data import chat
from elastic.data.labels import number_in
from elastic.data.task import Example
from elastic.errors import DataError
from elastic.models.kinds import (
    Kind,
    classes_of,
    has_types,
    is_number,
    kind_of,
    learnt_positions,
    longest_text,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """Those of the answer; none of a classifier's."""
        return self.ids[len(self.ids) - self.answer :]


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, encoder_decoder: bool = False
) -> Encoded:
    """Prompt, a space, the answer and the end-of-sequence token, as ids, of which a decoder's are
    those of the whole text; DataError where the prompt or the answer has none."""
    head = text_ids(tokenizer, prompt, encoder_decoder=encoder_decoder)
    if encoder_decoder:
        tail = tokenizer(answer, add_special_tokens=False)["input_ids"]
    else:
        tail = _behind(tokenizer, head, text_ids(tokenizer, f"{prompt} {answer}"), f" {answer}")
    if not head or not tail:
        raise DataError(f"prompt {prompt!r} or answer {answer!r} has no tokens")
    if tail[-1] != tokenizer.eos_token_id:
        tail = [*tail, tokenizer.eos_token_id]
    if encoder_decoder:
        return Encoded(tuple(tail), len(tail), tuple(head))
    return Encoded((*head, *tail), len(tail))


def text_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, *, encoder_decoder: bool = False
) -> list[int]:
    """What a model goes on from: without the end that some tokenizers append, which an encoder
    reads, and with one start where the text brings its own."""
    ids = list(tokenizer(text)["input_ids"])
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if not encoder_decoder and ids and ids[-1] == end:
        plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = ids[:-1] if ids[-len(plain) - 1 :] == [*plain, end] else ids
    return ids[1:] if start is not None and ids[:2] == [start, start] else ids


def _behind(
    tokenizer: PreTrainedTokenizerBase, head: list[int], whole: list[int], text: str
) -> list[int]:
    """The tokens of a text behind those of its prompt. Where the last of the prompt and the first
    of the text would be one, the prompt keeps its own, from which a model will go on."""
    if whole[: len(head)] == head:
        return whole[len(head) :]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encoded_chat(tokenizer: PreTrainedTokenizerBase, example: Example, answer: str) -> Encoded:
    """The conversation as the template writes it, with what it ends an answer with; the
    end-of-sequence token where that is no token of its own."""
    prompt = chat.prompt_in(tokenizer, example)
    said = chat.answer_in(tokenizer, example, prompt, answer)
    head, whole = (
        list(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (prompt, prompt + said)
    )
    tail = _behind(tokenizer, head, whole, said)
    if not head or not tail:
        raise DataError(f"prompt {prompt!r} or answer {said!r} has no tokens")
    ends = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
    if tail[-1] not in ends:
        tail = [*tail, tokenizer.eos_token_id]
    return Encoded((*head, *tail), len(tail))


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    example: Example,
    answer: str | None = None,
) -> Encoded:
    """With its answer, or another one, as this kind of model takes it; DataError for what has no
    tokens, or is none of a classifier's classes."""
    answer = example.answer if answer is None else answer
    kind = kind_of(model)
    if kind is Kind.CLASSIFIER:
        return replace(encode_text(tokenizer, model, example), label=_label(model, answer))
    if kind is Kind.ENCODER_DECODER:
        chat.require_plain(example)
        found = encode(tokenizer, example.text, answer, encoder_decoder=True)
        return replace(found, source=_cut(tokenizer, found.source, example.cutoff))
    if example.messages:
        found = _encoded_chat(tokenizer, example, answer)
    else:
        found = encode(tokenizer, example.text, answer)
    head, tail = found.ids[: -found.answer], found.ids[-found.answer :]
    return replace(found, ids=(*_cut(tokenizer, head, example.cutoff), *tail))


def _label(model: PreTrainedModel, answer: str) -> int | float:
    classes = classes_of(model)
    if is_number(classes):
        return number_in(answer)
    if answer not in classes:
        raise DataError(
            f"answer {answer!r} is none of the {len(classes)} classes that the model's head tells "
            f"apart: {', '.join(classes[:8])}"
        )
    return classes.index(answer)


def _cut(
    tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...], cutoff: int | None
) -> tuple[int, ...]:
    """The end of a prompt behind the token that starts every sequence, if there is one."""
    if cutoff is None or len(ids) <= cutoff:
        return ids
    start = ids[: int(ids[0] == tokenizer.bos_token_id)]
    return (*start, *ids[len(ids) - cutoff + len(start) :])


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, example: Example, model: PreTrainedModel
) -> list[int]:
    """What an answer is generated after: the prompt, or the conversation so far with the opening of
    the assistant's turn; DataError for a conversation without a chat template."""
    paired = kind_of(model) is Kind.ENCODER_DECODER
    if example.messages and not paired:
        prompt = chat.prompt_in(tokenizer, example)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        ids = text_ids(tokenizer, example.text, encoder_decoder=paired)
    return list(_cut(tokenizer, tuple(ids), example.cutoff))


def ends_of(
    tokenizer: PreTrainedTokenizerBase, example: Example, model: PreTrainedModel
) -> set[int]:
    """Tokens that end a generated answer: the end of the sequence, and of a conversation what its
    template ends an answer with."""
    if not example.messages or kind_of(model) is Kind.ENCODER_DECODER:
        return {tokenizer.eos_token_id}
    return {tokenizer.eos_token_id, _encoded_chat(tokenizer, example, example.answer).ids[-1]}


def encode_text(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, example: Example
) -> Encoded:
    """The ids of a text to be classified and, where the model has them, the types; what is longer
    than the model can read is cut. DataError for a text without tokens."""
    chat.require_plain(example)
    prompt = example.text if example.messages else example.prompt
    longest = most_tokens(model, tokenizer)
    found = tokenizer(
        prompt, example.second, truncation=True, max_length=min(longest, example.cutoff or longest),
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


@dataclass(frozen=True)
class Limits:
    """What a model has a place for."""

    tokens: int | None
    """Rows of its embedding; None where it does not say."""
    positions: int | None
    """Of a sequence, where they are learnt; None: any number."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Limits:
        positions = learnt_positions(model)
        if positions and kind_of(model) is Kind.ENCODER_DECODER:  # padding has positions, too
            positions -= positions % step_of(positions)
        try:
            tokens = getattr(model.get_input_embeddings(), "num_embeddings", None)
        except NotImplementedError:  # of code that comes with the model
            tokens = None
        return cls(tokens, positions)

    def require(self, ids: Sequence[int], more: int = 0) -> None:
        """DataError for ids that are beyond it, or leave no room for so many more."""
        if self.positions is not None and len(ids) + more > self.positions:
            new = f" and {more} to be generated" if more else ""
            raise DataError(
                f"{len(ids)} tokens{new}, and the model has {self.positions} positions; shorten "
                "it, or set task.cutoff to the tokens that a prompt may keep"
            )
        if self.tokens is not None and ids and max(ids) >= self.tokens:
            raise DataError(
                f"token {max(ids)} of the tokenizer is none of the {self.tokens} that the model's "
                "embedding has; give the tokenizer that belongs to the model"
            )


def encode_all(
    tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example], model: PreTrainedModel
) -> list[Encoded]:
    """Every example with its answer; DataError says where one stands that cannot be encoded, or
    that the model has no place for."""
    limits = Limits.of(model)
    found = []
    for example in track([*examples], "encoding examples"):
        with placed(example):
            encoded = encode_example(tokenizer, model, example)
            limits.require(encoded.source or encoded.ids)
            limits.require(encoded.ids)
        found.append(encoded)
    return found


@contextlib.contextmanager
def placed(example: Example) -> Iterator[None]:
    """A DataError in the block says where the example stands."""
    try:
        yield
    except DataError as error:
        where = f"{example.where}: " if example.where else ""
        raise DataError(f"{where}{error}") from None
