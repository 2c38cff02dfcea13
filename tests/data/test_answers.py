"""Padding before the tokens turns some models' answers into NaN; behind them it does not."""

import pytest
import torch

from elastic.data.answers import answer_logits, padding_is_seen
from elastic.data.collating import collate
from elastic.data.encoding import Encoded
from elastic.data.task import Example
from elastic.evaluation.evaluate import answers, evaluate
from elastic.spaces.declared import SearchSpace
from elastic.supernet.importance import channel_order
from tests.helpers import tiny
from tests.helpers.families import FAMILIES, model_of

EAGER = ("gemma2", "mistral", "llama", "bloom", "opt", "gpt-neox")
ASKED = [
    Example(prompt, "yes", ("yes", "no", "maybe"))
    for prompt in ("a", "Is it so, or is it not so at all?", "Which one of them is it?", "Is it?")
]


def eager(family: str, dtype: torch.dtype = torch.float64):
    """Gemma 2 and Bloom have no other attention; the rest can be told."""
    model = model_of(family, dtype)
    if model.config._attn_implementation != "eager":
        model.set_attn_implementation("eager")
    assert padding_is_seen(model)
    return model


def sequences() -> list[Encoded]:
    """Of 5 to 42 tokens: padding is longer than the windows of 4."""
    ids = tiny.tokens(4, 40).tolist()
    return [
        Encoded((tiny.BOS, *row[:length], tiny.EOS), answer)
        for row, (length, answer) in zip(ids, [(3, 2), (40, 5), (11, 3), (25, 1)], strict=True)
    ]


@pytest.mark.parametrize("family", EAGER)
def test_what_stands_beside_an_example_does_not_matter(family):
    model, whole = eager(family), sequences()
    with torch.no_grad():
        together, labels = answer_logits(model, collate(whole, tiny.PAD))
    for logits, label, each in zip(together, labels, whole, strict=True):
        alone = tiny.logits(model, torch.tensor([each.ids]))[0, -each.answer - 1 : -1]
        torch.testing.assert_close(logits[-each.answer :], alone, rtol=1e-5, atol=1e-5)
        assert label[-each.answer :].tolist() == list(each.ids[-each.answer :])


def test_scores_below_what_float16_can_add_to_its_lowest_number():
    """-65504 - 16 is -inf in float16: where a padding token likes nothing, its row is empty."""
    model = eager("opt", torch.float16)
    for block in model.model.decoder.layers:
        block.self_attn.q_proj.bias.fill_(4)
        block.self_attn.k_proj.bias.fill_(-4)
    short, long = sequences()[:2]
    with torch.no_grad():
        together, _ = answer_logits(model, collate([long, short], tiny.PAD))
    alone = tiny.logits(model, torch.tensor([short.ids]))[0, -short.answer - 1 : -1]
    torch.testing.assert_close(
        together[1, -short.answer :], alone.float(), rtol=0, atol=0.02 * float(alone.abs().max())
    )


@pytest.mark.parametrize("family", ["gemma2", "bloom"])
def test_batches_change_neither_scores_nor_what_is_said(family):
    model, tokenizer = eager(family), tiny.tokenizer()
    found = [evaluate(model, tokenizer, ASKED, batch_tokens=n, quiet=True) for n in (1, 99, 10**6)]
    assert found[0] == found[1] == found[2]
    said = [answers(model, tokenizer, ASKED, new_tokens=5, batch=n, quiet=True) for n in (1, 4)]
    assert said[0] == said[1] and any(said[0])


def test_training_has_gradients():
    model = eager("gemma2").requires_grad_(True)
    logits, labels = answer_logits(model, collate(sequences(), tiny.PAD))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["gemma2", "bloom"])
def test_the_order_of_channels_has_no_part_of_padding(family):
    model, whole = eager(family), sequences()
    bound = SearchSpace.load(FAMILIES[family][1]).bind(model, tiny.RANK)
    together = channel_order(model, bound, "activation", [collate(whole, tiny.PAD)])
    apart = channel_order(model, bound, "activation", [collate([x], tiny.PAD) for x in whole])
    assert all(torch.equal(apart[name], order) for name, order in together.items())
    plain = channel_order(model, bound, "activation", [{"input_ids": torch.tensor([x.ids])}
                                                       for x in whole])  # fmt: skip
    assert all(torch.equal(plain[name], order) for name, order in together.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_otherwise_answers_stand_at_one_place(dtype):
    assert not padding_is_seen(model_of("gemma2", dtype))
    assert not padding_is_seen(model_of("llama", dtype))
