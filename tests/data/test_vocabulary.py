"""Which tokens stay, and what a head of some tokens can say."""

from __future__ import annotations

import pytest
import torch

from elastic.data.encoding import encode_all
from elastic.data.task import Example, Judge
from elastic.data.vocabulary import sayable, token_order
from elastic.errors import ConfigError, DataError, DataMissing
from tests.helpers import tiny

VOCABULARY = tiny.VOCABULARY


def ids(text: str) -> list[int]:
    return tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


def order(examples, model=None, **settings):
    tokenizer, model = tiny.tokenizer(), model or tiny.llama()
    encoded = encode_all(tokenizer, examples, model)
    return token_order(tokenizer, model, examples, encoded, VOCABULARY, **settings)


def test_answers_and_options_come_first_then_what_the_task_has_most_often():
    examples = [Example("zzy", "ab"), Example("zz", "c", options=("c", "d"))]
    found = order(examples)
    first = set(found.tokens[: found.least].tolist())
    assert first == {*ids("abcd "), tiny.EOS}, "with the blank before them and what ends them"
    assert found.tokens[found.least : found.least + 3].tolist() == [*ids("z"), tiny.BOS, *ids("y")]
    assert sorted(found.tokens.tolist()) == list(range(VOCABULARY))
    rest = found.tokens[found.least + 3 :].tolist()
    assert rest == sorted(rest), "what nobody has stands by its number"


def test_a_text_decides_before_the_task_does(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("QQQ\nRR\n" * 600)
    found = order([Example("zzy", "ab")], text=str(file))
    at = found.least
    assert found.tokens[at : at + 3].tolist() == [*ids("QRz")]
    with pytest.raises(DataMissing, match="no such file"):
        order([Example("zzy", "ab")], text=str(tmp_path / "none"))


@pytest.mark.parametrize("content, reason", [
    (b"", "no text in it"),
    (b" \n\n", "no text in it"),
    (bytes([0xC4, 0x72]), "not UTF-8"),
])  # fmt: skip
def test_a_file_that_has_no_text_is_refused(content, reason, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        order([Example("z", "4", judge=Judge("number", "4", 8))], text=str(tmp_path / "text.txt"))


def test_what_another_task_needs_stays():
    found = order([Example("z", "a")], first=ids("XY"))
    assert set(ids("XYa")) <= set(found.tokens[: found.least].tolist())


def test_an_encoder_decoder_has_its_answers_and_prompts():
    found = order([Example("zzy", "ab")], model=tiny.t5())
    assert set(found.tokens[: found.least].tolist()) == {*ids("ab"), tiny.EOS}
    assert found.tokens[found.least].tolist() == ids("z")[0]


def test_generated_answers_need_a_text(tmp_path):
    open_ended = [Example("z", "so it is 4", judge=Judge("number", "4", 8))]
    with pytest.raises(ConfigError, match=r"--vocab\.text"):
        order(open_ended)
    (tmp_path / "text.txt").write_text("any")
    assert order(open_ended, text=str(tmp_path / "text.txt")).least


def test_what_cannot_be_said_is_counted():
    tokenizer, model = tiny.tokenizer(), tiny.llama()
    kept = torch.tensor([*ids(" ab"), tiny.EOS])
    found = sayable(tokenizer, model, [Example("z", each) for each in ("ab", "ac", "cc")], kept, 98)
    assert (found.tokens_known, found.answers, found.unsayable) == (4, 3, 2)
    assert (found.answer_tokens, found.answer_tokens_known) == (12, 9)
    assert "75.0% of those in the 3 test answers, 2 of which cannot be said" in str(found)
