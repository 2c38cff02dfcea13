"""Conversations in a model's own words: what its chat template makes of them, whole."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elastic.data.task import Example
from elastic.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = {"role", "content"}
Messages = Sequence[Mapping[str, Any]]


def prompt_in(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The conversation so far with the opening of the assistant's turn; DataError where the
    template refuses it, or makes nothing of it."""
    prompt = _rendered(tokenizer, example.messages, example.tools, opening=True)
    if not prompt.strip():
        raise DataError("the chat template of this model makes an empty prompt of it")
    return prompt


def answer_in(
    tokenizer: PreTrainedTokenizerBase, example: Example, prompt: str, answer: str
) -> str:
    """What the template writes behind the prompt for this answer, and ends it with: the answered
    conversation without the prompt, and without blanks at its end. DataError where the two do not
    fit together, or where the template leaves something out."""
    reply: Mapping[str, Any] = example.reply
    if answer != example.answer or not reply:
        reply = {"role": "assistant", "content": answer}
    answered = (*example.messages, reply)
    whole = _rendered(tokenizer, answered, example.tools)
    if not whole.startswith(prompt):
        raise DataError(
            "the chat template of this model writes a conversation otherwise once it is answered, "
            "so that the answer cannot be told from the prompt"
        )
    found = whole[len(prompt) :].rstrip()
    if not found:
        raise DataError("the chat template of this model leaves the answer out")
    for name, messages, tools in _lacking(answered, example.tools):
        if _is_same(tokenizer, messages, tools, whole):
            raise DataError(f"the chat template of this model leaves {name} out")
    return found


def require_plain(example: Example) -> None:
    """DataError for a conversation of more than texts, for models that read the texts alone."""
    extra = {name for each in (*example.messages, example.reply) for name in each} - PLAIN
    if example.tools:
        extra.add("tools")
    if extra:
        raise DataError(
            f"the conversation has {', '.join(sorted(extra))}, which only a decoder's chat "
            "template puts into words; this model reads the texts alone"
        )


def _lacking(messages: Messages, tools: Messages) -> Iterator[tuple[str, Messages, Messages]]:
    """The same conversation without one of the things that must not be lost, by name."""
    if tools:
        yield "`tools`", messages, ()
    if any("tool_calls" in each for each in messages):
        without = [
            {"content": "", **{name: value for name, value in each.items() if name != "tool_calls"}}
            for each in messages
        ]
        yield "`tool_calls`", without, tools
    # One of every role stands for the others: rendering takes its time.
    first = {each["role"]: -number for number, each in enumerate(reversed(messages[:-1]), 2)}
    names = {-2: "the messages"}
    names |= {n: f"the {role} message" for role, n in first.items() if n != -2}
    for number, name in names.items():
        before, [asked, *after] = messages[:number], messages[number:]
        if text := asked.get("content"):
            yield name, (*before, {**asked, "content": f"{text}?"}, *after), tools


def _is_same(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Messages, whole: str
) -> bool:
    try:
        return _rendered(tokenizer, messages, tools) == whole
    except DataError:  # it is missed
        return False


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Messages, opening: bool = False
) -> str:
    if tokenizer.chat_template is None:
        raise DataError("task.prompt chat: the tokenizer of this model has no chat template")
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(each) for each in messages],
                tools=[dict(each) for each in tools] or None,
                add_generation_prompt=opening,
                tokenize=False,
            )
        )
    except Exception as error:  # a template is a program: it may raise anything
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        raise DataError(f"the chat template of this model refuses it: {reason}") from None
