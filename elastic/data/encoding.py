"""Examples as tokens: prompt and answer as each kind of model takes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from elastic.data.labels import number_in
from elastic.data.task import Example
from elastic.errors import DataError
from elastic.models.kinds import Kind, classes_of, has_types, is_number, kind_of, longest_text

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


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, encoder_decoder: bool = False
) -> Encoded:
    """Prompt, a space, the answer and the end-of-sequence token, as ids; DataError where the prompt
    or the answer has none."""
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
    """With its answer, or another one, as this kind of model takes it; DataError for what has no
    tokens, or is none of a classifier's classes."""
    answer = example.answer if answer is None else answer
    kind = kind_of(model)
    if kind is not Kind.CLASSIFIER:
        paired = kind is Kind.ENCODER_DECODER
        if paired or not example.messages:
            return encode(tokenizer, example.text, answer, encoder_decoder=paired)
        tail = (*tokenizer(answer, add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id)  # fmt: skip
        return Encoded((*prompt_ids(tokenizer, example), *tail), len(tail))
    text, classes = encode_text(tokenizer, model, example), classes_of(model)
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
    the assistant's turn; DataError for a conversation without a chat template."""
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
    than the model can read is cut. DataError for a text without tokens."""
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
