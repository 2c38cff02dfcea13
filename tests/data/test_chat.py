"""A conversation is trained as the chat template of the model writes it, whole, or refused."""

import json

import pytest

from elastic.config import TaskConfig
from elastic.data import load_task
from elastic.data.encoding import encode_all, encode_example, ends_of, prompt_ids
from elastic.data.task import Example
from elastic.errors import DataError
from tests.helpers import tiny

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "two and two?"}
REPLY = {"role": "assistant", "content": "4"}
CHAT = [SYSTEM, USER, REPLY]
TEMPLATE = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }}{% endfor %}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}>"
    "{{ (m.content or '') | trim }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }}){% endfor %}"
    "{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}<pad>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Ends a message with a token that does not end the sequence, and trims what is said."""
BARE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Ends a message with nothing."""
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


def tokenizer(template: str = TEMPLATE):
    found = tiny.tokenizer()
    found.chat_template = template
    return found


def task_of(tmp_path, *rows):
    """One training row each, tested on another."""
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "other.jsonl"),
             "test": str(tmp_path / "test.jsonl")}  # fmt: skip
    for name in ("other", "test"):
        row = {"messages": [{"role": "user", "content": name}, REPLY]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    return load_task(TaskConfig(name="jsonl", prompt="chat", draw="position", **files), 0)


def example_of(tmp_path, row) -> Example:
    return task_of(tmp_path, row).train[0]


def test_trained_is_what_the_template_ends_an_answer_with(tmp_path, model):
    said = {"role": "assistant", "content": "  4 \n"}
    example = example_of(tmp_path, {"messages": [SYSTEM, USER, said]})
    assert example.text == "Be brief.\ntwo and two?"
    words = tokenizer()
    encoded = encode_example(words, model, example)
    opened = "<system>Be brief.<pad>\n<user>two and two?<pad>\n<assistant>"
    assert list(encoded.ids[: -encoded.answer]) == prompt_ids(words, example, model)
    assert prompt_ids(words, example, model) == words(opened, add_special_tokens=False)["input_ids"]
    assert words.decode(encoded.ids[-encoded.answer :]) == "4<pad>"
    assert ends_of(words, example, model) == {tiny.PAD, tiny.EOS}


def test_a_template_that_ends_an_answer_with_nothing_is_ended(tmp_path, model):
    example = example_of(tmp_path, {"messages": CHAT})
    encoded = encode_example(tokenizer(BARE), model, example)
    assert tokenizer().decode(encoded.ids[-encoded.answer :]) == "4<eos>"
    assert ends_of(tokenizer(BARE), example, model) == {tiny.EOS}


def test_whole_messages_and_tools_go_through_the_template(tmp_path, model):
    row = {"tools": [TOOL], "messages": [
        {**USER, "name": "Ann"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "4", "tool_call_id": "c1"}, REPLY,
    ]}  # fmt: skip
    words = tokenizer()
    encoded = encode_example(words, model, example_of(tmp_path, row))
    assert words.decode(encoded.ids) == (
        "[add]<user Ann>two and two?<pad><assistant>(add)<pad><tool>4#c1<pad><assistant>4<pad>"
    )  # the tiny vocabulary has no new line
    called = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    encoded = encode_example(words, model, example_of(tmp_path, called))
    assert words.decode(encoded.ids[-encoded.answer :]) == "(add)<pad>"


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (None, {"messages": CHAT}, "has no chat template"),
        (BARE, {"tools": [TOOL], "messages": CHAT}, "leaves `tools` out"),
        (BARE, {"messages": [USER, {**REPLY, "tool_calls": [CALL]}]}, "leaves `tool_calls` out"),
        ("{{ raise_exception('no system role') }}", {"messages": CHAT}, "refuses it: .*no system"),
        ("{{ 1 / 0 }}", {"messages": CHAT}, "refuses it: ZeroDivisionError"),
        ("{{ messages.no.where }}", {"messages": CHAT}, "refuses it"),
        ("{% for", {"messages": CHAT}, "refuses it"),
        ("", {"messages": CHAT}, "empty prompt"),
        (" \n", {"messages": CHAT}, "empty prompt"),
        ("hello", {"messages": CHAT}, "leaves the answer out"),
        ("hello{% if not add_generation_prompt %}{{ messages[-1].content }}{% endif %}",
         {"messages": CHAT}, "leaves the messages out"),
        (BARE.replace("messages %}", "messages if m.role != 'system' %}"), {"messages": CHAT},
         "leaves the system message out"),
        (BARE.replace("{{ m.content }}", "{{ m.content if m.role != 'assistant' or loop.last }}"),
         {"messages": [USER, {**REPLY, "content": "5"}, USER, REPLY]},
         "leaves the assistant message out"),
        ("{{ messages | length }}{{ messages[-1].content }}", {"messages": CHAT},
         "otherwise once it is answered"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_say_is_named_by_its_row(tmp_path, model, template, row, message):
    task = task_of(tmp_path, row)
    with pytest.raises(DataError, match=rf"train\.jsonl:1: .*{message}") as caught:
        encode_all(tokenizer(template), task.train, model)
    assert "\n" not in str(caught.value)


def test_models_that_read_texts_alone_refuse_more(tmp_path):
    plain = example_of(tmp_path, {"messages": CHAT})
    calls = example_of(tmp_path, {"tools": [TOOL], "messages": [{**USER, "name": "Ann"}, REPLY]})
    model, words = tiny.t5(), tokenizer()
    assert encode_example(words, model, plain).source
    with pytest.raises(DataError, match="the conversation has name, tools, which only a decoder"):
        encode_example(words, model, calls)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, "field 'messages' is 'hello'; .* wants a list of objects"),
        ({"messages": None, "id": 1}, "field 'messages' is null; .* the row has id"),
        ({"prompt": "x", "answer": "a"}, "field 'messages' is missing; .* has answer, prompt"),
        ({"messages": [{"role": "user"}, REPLY]}, "message 1 of 2: its content is missing"),
        ({"messages": [USER, {"role": "assistant", "content": None}]},
         "message 2 of 2: its content is null; give a text"),
        ({"messages": [{**USER, "content": ["a"]}, REPLY]}, r"content is \['a'\]; give one text"),
        ({"messages": [{"content": "a"}, REPLY]}, "message 1 of 2: it has no role"),
        ({"messages": [USER, {**REPLY, "content": " \n"}]}, "the answer, is blank"),
        ({"messages": CHAT[:2]}, "the last message must be the assistant's"),
        ({"messages": CHAT[2:]}, "and not the only one"),
        ({"messages": CHAT, "tools": "add"}, "field 'tools' is 'add'; give a list of objects"),
    ],
)  # fmt: skip
def test_a_faulty_conversation_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"train\.jsonl:2: .*{message}"):
        task_of(tmp_path, {"messages": CHAT}, row)
