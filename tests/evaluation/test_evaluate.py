"""A score is what generation would have earned, one example at a time."""

from __future__ import annotations

import math
import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.data.answers import answer_logits
from elastic.data.collating import IGNORED, answer_width, collate, length_sorted
from elastic.data.encoding import Encoded, encode
from elastic.data.task import Example
from elastic.errors import DataError
from elastic.evaluation.evaluate import evaluate
from elastic.evaluation.statistics import Score, difference, paired, wilson
from tests.helpers import tiny
from tests.helpers.learnt import PROMPTS, TOKENIZER, examples, generated


def test_exact_score_equals_greedy_generation(model):
    asked = examples(model)
    expected = tuple(generated(model, e.prompt) == f" {e.answer}<eos>" for e in asked)
    assert 4 <= sum(expected) < len(asked) / 2, "some must be right and some wrong"
    assert evaluate(model, TOKENIZER, asked).correct == expected


def choices(seed: int = 0) -> list[Example]:
    generator = random.Random(seed)
    found = []
    for prompt in PROMPTS:
        options = tuple(dict.fromkeys(str(generator.randint(1, 999)) for _ in range(4)))
        found.append(Example(prompt, generator.choice(options), options))
    return found


def log_likelihood(model, prompt: str, answer: str) -> float:
    ids = TOKENIZER(prompt)["input_ids"]
    total = 0.0
    for token in TOKENIZER(" " + answer, add_special_tokens=False)["input_ids"]:
        last = tiny.logits(model, torch.tensor([ids]))[0, -1]
        total += float(last.log_softmax(0)[token])
        ids = [*ids, token]
    return total


def picks_right(model, example: Example) -> bool:
    scores = {o: log_likelihood(model, example.prompt, o) for o in example.options}
    return max(scores, key=scores.get) == example.answer


def test_likelihood_score_equals_a_computation_one_by_one(model):
    asked = choices()
    expected = tuple(picks_right(model, example) for example in asked)
    assert 0 < sum(expected) < len(asked)
    assert evaluate(model, TOKENIZER, asked).correct == expected
    assert evaluate(model, TOKENIZER, asked[::-1]).correct == expected[::-1]


@pytest.mark.parametrize(
    "options, sequences",
    [
        (("answer1", "answer2", "answer3"), 1),  # all but the last token are alike
        (("a", "b", "cd"), 1),  # what begins the long one tells of the short ones
        (("ab", "cd", "ce", "a"), 2),
        (("abc", "bbc", "cbc"), 3),
        (("the cat", "the cat sat", "the dog"), 2),  # they begin alike, one is all of that
    ],
)
def test_options_share_what_they_have_in_common(model, options, sequences, monkeypatch):
    seen = []
    monkeypatch.setattr(
        sys.modules["elastic.evaluation.evaluate"],
        "collate",
        lambda rows, pad: seen.extend(rows) or collate(rows, pad),
    )
    asked = [Example(prompt, option, options) for prompt in PROMPTS for option in options]
    expected = tuple(picks_right(model, example) for example in asked)
    assert evaluate(model, TOKENIZER, asked).correct == expected
    assert sum(expected) == len(PROMPTS)
    assert len(seen) == sequences * len(asked)


def test_examples_with_and_without_options_mix(model):
    plain, optional = examples(model)[:6], choices()
    apart = evaluate(model, TOKENIZER, plain).correct + evaluate(model, TOKENIZER, optional).correct
    assert evaluate(model, TOKENIZER, plain + optional).correct == apart
    mixed = evaluate(model, TOKENIZER, optional + plain).correct
    assert mixed == apart[len(plain) :] + apart[: len(plain)]


@pytest.mark.parametrize("batch_tokens", [1, 40, 100, 333, 10**6])
def test_batch_size_changes_nothing(model, batch_tokens):
    for asked in (examples(model), choices()):
        expected = evaluate(model, TOKENIZER, asked, batch_tokens=64).correct
        assert evaluate(model, TOKENIZER, asked, batch_tokens=batch_tokens).correct == expected


# Batches


ENCODED = st.builds(
    lambda ids, answer: Encoded(tuple(ids), min(answer, len(ids) - 1)),
    st.lists(st.integers(3, 97), min_size=2, max_size=30),
    st.integers(1, 9),
)


@given(st.lists(ENCODED, min_size=1, max_size=5))
def test_collate_pads_on_the_left(sequences):
    batch = collate(sequences, tiny.PAD)
    longest = max(len(s.ids) for s in sequences)
    length = batch["input_ids"].shape[1]
    assert length % 8 == 0 and longest <= length < longest + 8
    for row, sequence in enumerate(sequences):
        n = len(sequence.ids)
        ids, mask, positions, labels = (
            batch[key][row].tolist()
            for key in ("input_ids", "attention_mask", "position_ids", "labels")
        )
        assert ids == [tiny.PAD] * (length - n) + list(sequence.ids)
        assert mask == [0] * (length - n) + [1] * n
        assert positions[length - n :] == list(range(n)) and min(positions) == 0
        kept = sequence.answer
        assert labels == [IGNORED] * (length - kept) + list(sequence.ids[-kept:])
    assert answer_width(batch["labels"]) == max(s.answer for s in sequences)


@given(st.lists(ENCODED, min_size=1, max_size=40), st.integers(1, 2000))
def test_batches_hold_every_sequence_once_longest_first(sequences, batch_tokens):
    batches = list(length_sorted(sequences, batch_tokens))
    rows = [row for found, _ in batches for row in found]
    assert sorted(rows) == list(range(len(sequences)))
    lengths = [len(sequences[row].ids) for row in rows]
    assert lengths == sorted(lengths, reverse=True)
    for found, chosen in batches:
        assert [sequences[row] for row in found] == chosen
        inputs = collate(chosen, 0)["input_ids"]
        assert inputs.numel() <= batch_tokens or len(found) == 1
        worth_a_pass = inputs[:-1].numel() >= 512
        assert not worth_a_pass or len(chosen[-1].ids) >= inputs.shape[1] * 7 / 8


def test_what_stands_beside_an_example_does_not_matter():
    model = tiny.llama()
    short, long = Encoded((1, 40, 50, 60, 2), 2), Encoded((1, *range(20, 48), 2), 4)
    alone, labels = answer_logits(model, collate([short], tiny.PAD))
    beside, _ = answer_logits(model, collate([long, short], tiny.PAD))
    torch.testing.assert_close(beside[1, -2:], alone[0], rtol=1e-12, atol=1e-12)
    assert labels.tolist() == [[60, 2]]
    whole = tiny.logits(model, torch.tensor([short.ids]))[0, -3:-1]
    torch.testing.assert_close(alone[0], whole, rtol=1e-12, atol=1e-12)


def test_encoding_joins_by_a_space_and_ends():
    encoded = encode(TOKENIZER, "How many?", "12")
    assert TOKENIZER.decode(list(encoded.ids)) == "<bos>How many? 12<eos>"
    assert TOKENIZER.decode(list(encoded.ids[-encoded.answer :])) == " 12<eos>"


def test_a_prompt_without_tokens_is_refused():
    silent = tiny.tokenizer()
    silent._tokenizer.post_processor = None  # no <bos>
    silent = type(silent)(tokenizer_object=silent._tokenizer, eos_token="<eos>")
    with pytest.raises(DataError, match="has no tokens"):
        encode(silent, "", "12")


# Scores


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # Wilson 1927 by hand, z = 1.959964
        (0, 10, 0.0, 0.27753),
        (5, 10, 0.23659, 0.76341),
        (10, 10, 0.72247, 1.0),
        (81, 263, 0.25525, 0.36621),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),  # the same table
    ],
)
def test_wilson_by_known_values(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=5.1e-5)


@given(st.integers(1, 5000), st.data())
def test_wilson_bounds(n, data):
    right = data.draw(st.integers(0, n))
    low, high = wilson(right, n)
    assert 0 <= low <= right / n + 1e-12 and right / n - 1e-12 <= high <= 1
    assert low < high
    mirrored = wilson(n - right, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)
    wider = wilson(right, n, z=3.0)
    assert wider[0] <= low + 1e-12 and high <= wider[1] + 1e-12


def test_a_paired_interval_is_the_normal_one_of_half_a_pair_more_of_each_kind():
    """By the variance of the four counts. 794 said yes twice, 150 first, 86 then, 570 never: the
    survey of Agresti's Categorical Data Analysis (chapter 10), which has -0.06 to -0.02."""
    both, won, lost, neither = 794, 86, 150, 570
    counts = np.array([both, won, lost, neither]) + 0.5
    p, effect = counts / counts.sum(), np.array([0, 1, -1, 0])
    mean = p @ effect
    half = 1.959964 * np.sqrt((p @ effect**2 - mean**2) / counts.sum())
    low, high = paired(won, lost, 1600)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=1e-12)
    assert (round(low, 2), round(high, 2)) == (-0.06, -0.02)


@given(st.integers(1, 3000), st.data())
def test_paired_bounds(n, data):
    won = data.draw(st.integers(0, n))
    lost = data.draw(st.integers(0, n - won))
    low, high = paired(won, lost, n)
    assert -1 <= low <= (won - lost) / n + 1e-12 and (won - lost) / n - 1e-12 <= high <= 1
    assert paired(lost, won, n) == pytest.approx((-high, -low), abs=1e-12)
    low, high = paired(won, won, 2 * n)
    assert low == pytest.approx(-high) and high > 0


@pytest.mark.parametrize(("p", "q"), [(0.05, 0.02), (0.1, 0.1), (0.2, 0.05), (0.4, 0.01)])
def test_a_paired_interval_holds_the_truth_in_95_of_100_cases(p, q):
    """Summed over all outcomes of 40 pairs; at 5 and 2 % the plain normal one has 86 %."""
    n, covered = 40, 0.0
    for won in range(n + 1):
        for lost in range(n + 1 - won):
            low, high = paired(won, lost, n)
            ways = math.comb(n, won) * math.comb(n - won, lost)
            if low <= p - q <= high:
                covered += ways * p**won * q**lost * (1 - p - q) ** (n - won - lost)
    assert covered > 0.94


def test_a_difference_is_of_the_same_examples():
    one, other = Score((True, True, False, True)), Score((True, False, True, False))
    assert difference(one, other) == (0.25, paired(2, 1, 4))
    assert difference(other, one)[0] == -0.25
    gap, (low, high) = difference(one, one)
    assert gap == 0 and low == -high < 0
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        difference(one, Score((True,)))


def test_a_score_counts():
    score = Score((True, False, True, True))
    assert (score.n, score.accuracy) == (4, 0.75)
    assert score.interval == wilson(3, 4)
    assert score.as_dict()["accuracy_n"] == 4
    assert str(score) == "75.0% [30.1%, 95.4%] of 4"
