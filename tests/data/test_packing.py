"""Sequences that share a row are, each of them, what they are alone."""

import random
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import ModelConfig, StageConfig
from elastic.data.answers import answer_logits, answer_loss
from elastic.data.collating import IGNORED, collate, in_rows, pack, rows_of
from elastic.data.encoding import Encoded
from elastic.errors import ConfigError
from elastic.spaces.declared import SearchSpace
from elastic.supernet.supernet import Supernet
from elastic.training.checks import require_apart
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.families import FAMILIES, ROUNDED, model_of
from tests.helpers.laws import close
from tests.helpers.tiny_runs import factors, metrics, train_config

CAUSAL = [
    name
    for name, (kind, *_) in FAMILIES.items()
    if kind.endswith(("ForCausalLM", "LMHeadModel")) and name != "rwkv"
]
LOOKS_BEYOND = ["bloom", "opt"]
"""No position reaches the model, so that none can begin anew."""
LENGTHS = (3, 9, 4, 17, 5, 8, 3, 12)


def sequences() -> list[Encoded]:
    generator = random.Random(0)
    made = []
    for number, length in enumerate(LENGTHS):
        ids = tuple(generator.randrange(3, tiny.VOCABULARY) for _ in range(length))
        made.append(Encoded(ids, 1 + number % 3 if length > 3 else 2))
    return made


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(0, 20))
def test_rows_hold_every_sequence_once_and_never_too_much(lengths, spare):
    room = max(lengths) + spare
    rows = rows_of(lengths, room)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    filled = [sum(lengths[number] for number in row) for row in rows]
    assert max(filled) <= room
    assert sum(2 * each <= room for each in filled) <= 1  # two such would have shared one


def test_a_row_says_where_each_sequence_begins():
    batch = in_rows([Encoded((5, 6, 7), 1), Encoded((8, 9), 1)], [[0, 1]], 8, pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert batch["segments"].tolist() == [[1, 1, 1, 2, 2, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, IGNORED, 9, *[IGNORED] * 3]]


def loss_and_gradient(family, batch):
    space = SearchSpace.load(FAMILIES[family][1])
    net = tiny.randomize_(Supernet(model_of(family), space, tiny.ADAPTERS["lora"]))
    with net.active(net.space.minimal()):
        loss = answer_loss(*answer_logits(net.model, batch))
        loss.backward()
    grads = [p.grad.flatten() for p in net.model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(grads)


@pytest.mark.parametrize("family", CAUSAL)
def test_what_is_not_refused_has_the_loss_and_the_gradient_of_padded_batches(family):
    """Which classes look beyond their own sequence changes with transformers; the law does not."""
    packed, beside = pack(sequences(), tiny.PAD), collate(sequences(), tiny.PAD)
    assert packed["input_ids"].shape[0] < beside["input_ids"].shape[0]
    assert packed["input_ids"].shape[1] == beside["input_ids"].shape[1]
    loss, gradient = loss_and_gradient(family, packed)
    expected, expected_gradient = loss_and_gradient(family, beside)
    assert expected_gradient.abs().max() > 0
    try:
        require_apart(model_of(family), sequences(), tiny.PAD)
    except ConfigError as refused:
        assert re.search(r"packing: \w+ForCausalLM .* leave packing out", str(refused))
        assert (gradient - expected_gradient).norm() > 1e-3 * expected_gradient.norm()
        return
    precision = 1e-5 if family in ROUNDED else 1e-10
    close(loss, expected, precision)
    close(gradient, expected_gradient, precision)


@pytest.mark.parametrize("family", LOOKS_BEYOND)
def test_sequences_that_would_see_each_other_are_refused(family):
    require_apart(model_of("llama"), sequences(), tiny.PAD)
    with pytest.raises(ConfigError, match=r"packing: \w+ForCausalLM .* leave packing out"):
        require_apart(model_of(family), sequences(), tiny.PAD)


def test_a_packed_run_learns_what_a_padded_one_does(tiny_folder, tmp_path):
    """Steps hold the same examples when an epoch is one step, in whatever order."""
    settings = dict(batch_size=32, stages=[StageConfig(epochs=3)])
    padded = train_one(train_config(tiny_folder, tmp_path / "padded", **settings))
    packed = train_one(train_config(tiny_folder, tmp_path / "packed", packing=True, **settings))
    for name, tensor in factors(padded).items():
        torch.testing.assert_close(factors(packed)[name], tensor, rtol=1e-3, atol=2e-5)
    before, after = metrics(padded), metrics(packed)
    assert [round(one["loss"], 4) for one in before if "loss" in one] == [
        round(one["loss"], 4) for one in after if "loss" in one
    ]


@pytest.mark.parametrize("settings, message", [
    ({"head": "classification", "classes": ["a", "b"]}, "packing: .* a classification head"),
])  # fmt: skip
def test_models_that_cannot_pack_are_refused_before_weights_load(
    tiny_folder, tmp_path, settings, message
):
    model = ModelConfig(path=str(tiny_folder), dtype="float32", device="cpu", **settings)
    with pytest.raises(ConfigError, match=message):
        train_one(train_config(tiny_folder, tmp_path / "run", packing=True, model=model))
    assert not (tmp_path / "run").exists()
