"""Prompts and answers that a tiny model learns by heart."""

from __future__ import annotations

import torch

from elastic.data.task import Example
from tests.helpers import tiny

TOKENIZER = tiny.tokenizer()
PROMPTS = [
    f"{name} has {number} {thing}. How many?"
    for number, (name, thing) in enumerate(
        [("Tom", "pens"), ("Ann", "books"), ("Sam", "eggs"), ("Evangeline", "old coins"),
         ("Ben", "cards"), ("Mia", "shells"), ("Leo", "stamps"), ("Z", "x")],
        start=11,
    )
]  # fmt: skip
LEARNT = [" 1", " 23", " 456", " 7", " 89", " 1000"]


def generated(model, prompt: str, most: int = 12) -> str:
    """What greedy generation says after the prompt, up to the end token if there is one."""
    ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False
    )
    return TOKENIZER.decode(whole[0, ids.shape[1] :])


def examples(model) -> list[Example]:
    """Answers taken from the model's own generations, and spoilt ones beside them."""
    found = []
    for prompt in PROMPTS:
        said = generated(model, prompt).removesuffix("<eos>").strip() or "?"
        found.append(Example(prompt, said))
        found.append(Example(prompt, said + "1"))  # goes on where generation stops
        found.append(Example(prompt, said[:-1] or "?"))  # stops where generation goes on
        found.append(Example(prompt, "x" + said[1:]))
    return found
