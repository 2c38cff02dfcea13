"""A tiny model that is right now and then."""

from __future__ import annotations

import pytest
import torch

from elastic.data.answers import answer_logits
from elastic.data.collating import IGNORED, collate
from elastic.data.encoding import encode
from tests.helpers import tiny
from tests.helpers.learnt import LEARNT, PROMPTS, TOKENIZER


@pytest.fixture(scope="session")
def model():
    """A tiny model that has learnt six answers by heart, so that it can be right at all."""
    model = tiny.llama(initializer_range=0.1)
    texts = [encode(TOKENIZER, p, a.strip()) for p, a in zip(PROMPTS, LEARNT, strict=False)]
    batch = collate(texts, tiny.PAD)
    model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        logits, labels = answer_logits(model, batch)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    return model.requires_grad_(False)
