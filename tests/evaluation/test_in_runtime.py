"""Asked one at a time through any runner, a model is right where it is in torch's batches."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from elastic.data import llm_adapters
from elastic.data.task import Example, Judge
from elastic.evaluation.evaluate import answers, evaluate
from elastic.evaluation.in_runtime import answer, continued, likelihood, score
from elastic.formats import onnx, openvino
from elastic.formats.runner import runner_of
from tests.helpers import tiny
from tests.helpers.families import model_of
from tests.helpers.learnt import examples

TOKENIZER = tiny.tokenizer()
WORDS = ["one", "two", "three, or more", "a", "ab", "b", "yes", "no"]


def chosen(number: int = 24) -> list[Example]:
    """With options of one token, of several, and some that begin with others."""
    generator = random.Random(0)
    found = []
    for index in range(number):
        options = tuple(generator.sample(WORDS, 3 if index % 3 else 8))
        found.append(Example(f"number {index * index}?", generator.choice(options), options))
    return found


def judged(model, number: int = 8) -> list[Example]:
    """Half of them expect what the model says; two lengths of texts."""
    asked = [Example(f"say {index}: ", "1") for index in range(number)]
    texts = answers(model, TOKENIZER, asked, new_tokens=16)
    found = []
    for index, (example, text) in enumerate(zip(asked, texts, strict=True)):
        said = llm_adapters.extract("number", text) or "0"
        expected = said if index % 2 else "12345678"
        judge = Judge("number", expected, (16, 5)[index % 4 == 0])
        found.append(dataclasses.replace(example, judge=judge))
    return found


def both(model, asked: list[Example]):
    return score(runner_of(model), model, TOKENIZER, asked), evaluate(model, TOKENIZER, asked)


def test_what_greedy_generation_would_say(model):
    mine, batched = both(model, examples(model))
    assert mine == batched and 0 < mine.accuracy < 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "rwkv"])
def test_options_and_judged_texts(family):
    """And exact answers, which a random model never gives, in between."""
    random_model = model_of(family)
    exact = [Example(f"{number} is", "x") for number in range(3)]
    asked = [*judged(random_model), *exact, *chosen()]
    mine, batched = both(random_model, asked)
    assert mine == batched
    assert mine.unanswered is not None and 0 < sum(mine.correct[11:]) < 24
    if family in ("llama", "gpt2"):  # the others say no number at all
        assert 0 < sum(mine.correct[:8]) < 8


@pytest.mark.parametrize("family", ["bert, classes", "roberta", "bert, a score"])
def test_classes_and_numbers(family):
    classifier = model_of(family)
    names = classifier.config.id2label = dict(enumerate(["no", "maybe", "yes"]))
    number = family.endswith("score")
    if number:
        names = classifier.config.id2label = {0: "score"}
        classifier.config.problem_type = "regression"
    generator = random.Random(0)
    asked = []
    for index in range(32):
        right = f"{generator.gauss(0, 1):.3f}" if number else generator.choice(list(names.values()))
        # Whose sentences BERT tells apart: with all of them the first, others come out.
        asked.append(Example(f"text {index}", right, second="and " * (index % 4) + "more",
                             tolerance=0.6))  # fmt: skip
    mine, batched = both(classifier, asked)
    assert mine == batched and 0 < mine.accuracy < 1
    if family.startswith("bert"):
        alone = [dataclasses.replace(each, second=None, prompt=each.text) for each in asked]
        assert score(runner_of(classifier), classifier, TOKENIZER, alone).said != mine.said


def test_written_models_are_right_where_torch_is(tmp_path):
    llama = model_of("llama", torch.float32)
    asked = [*judged(llama), *chosen()]
    expected = evaluate(llama, TOKENIZER, asked)
    graph = onnx.write(llama, tmp_path)
    for runner in (onnx.OnnxRunner(graph), openvino.OpenVINORunner(
        openvino.write(graph, tmp_path))):  # fmt: skip
        assert score(runner, llama, TOKENIZER, asked) == expected
    bert = model_of("bert, classes", torch.float32)
    bert.config.id2label = dict(enumerate(["no", "maybe", "yes"]))
    pairs = [Example(f"text {n}", "yes", second="and more " * (n % 3)) for n in range(12)]
    expected = evaluate(bert, TOKENIZER, pairs)
    graph = onnx.write(bert, tmp_path / "bert")
    for runner in (onnx.OnnxRunner(graph), openvino.OpenVINORunner(
        openvino.write(graph, tmp_path / "bert"))):  # fmt: skip
        assert score(runner, bert, TOKENIZER, pairs) == expected


def test_a_step_is_taken_only_when_it_decides():
    class Counting:
        def __init__(self, says):
            self.says, self.calls = says, 0

        def prefill(self, input_ids):
            self.calls = 0
            return self.decode(input_ids)

        def decode(self, input_ids):
            self.calls += 1
            return np.eye(tiny.VOCABULARY)[None, self.says[min(self.calls, len(self.says)) - 1]]

    x, y = TOKENIZER("xy", add_special_tokens=False)["input_ids"]
    llama = model_of("llama")
    wrong = Counting([x])  # the answer begins with a space
    assert score(wrong, llama, TOKENIZER, [Example("a", "xyz")]).correct == (False,)
    assert wrong.calls == 1
    ends = Counting([x, y, tiny.EOS])
    assert answer(ends, llama, TOKENIZER, Example("a", ""), 9) == "xy" and ends.calls == 3
    assert answer(ends, llama, TOKENIZER, Example("a", ""), 2) == "xy" and ends.calls == 2
    assert continued(ends, TOKENIZER, [x], 9, {tiny.EOS}, ["y"]) == "x" and ends.calls == 2
    value, greedy = likelihood(ends, [x], [x, y])
    assert greedy and ends.calls == 2
    assert value == pytest.approx(-2 * np.log(1 + (tiny.VOCABULARY - 1) / np.e))
