"""An answer that a head cannot say is wrong, however it is asked."""

from __future__ import annotations

import pytest
import torch

from elastic.data.task import Example
from elastic.evaluation import in_runtime
from elastic.evaluation.evaluate import evaluate
from elastic.formats.runner import runner_of
from elastic.models.vocabulary import cut_head, put_head_
from tests.helpers import tiny


def knowing(text: str):
    """A model that knows the tokens of a text and the end."""
    model, ids = tiny.llama(), tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]
    put_head_(model, "lm_head", cut_head(model.lm_head, torch.tensor([*ids, tiny.EOS])))
    return model


@pytest.mark.parametrize("answer, options, right", [
    ("b", ("b", "c"), False),  # neither can be said
    ("a", ("b", "a"), True),  # it alone can
    ("b", ("a", "b"), False),
    ("b", (), False),
])  # fmt: skip
def test_what_cannot_be_said_is_wrong(answer, options, right):
    model, tokenizer = knowing(" a"), tiny.tokenizer()
    examples = [Example("q", answer, options=options)]
    assert evaluate(model, tokenizer, examples, quiet=True).correct == (right,)
    asked = in_runtime.score(runner_of(model), model, tokenizer, examples)
    assert asked.correct == (right,)
