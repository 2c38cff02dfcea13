"""What one training step computes: the lean layer, the loss, and which examples it sees."""

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from elastic.adapters.layers import ElasticLinear
from elastic.adapters.lora import Lora
from elastic.config import AdapterConfig, StageConfig
from elastic.data.answers import answer_logits, answer_loss
from elastic.data.collating import IGNORED, SimilarLengths
from elastic.data.encoding import padded
from elastic.models.modules import plain_linear
from elastic.training.one_task import train_one
from elastic.training.trainer import ElasticTrainer
from tests.helpers.tiny_runs import train_config


def elastic_linear(*, bias: bool, dropout: float = 0.0, seed: int = 0) -> ElasticLinear:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    adapter = Lora(AdapterConfig(rank=4, alpha=12.0), 10, 6, dtype=torch.float64)
    with torch.no_grad():
        adapter.A.copy_(noise(4, 6))
        adapter.B.copy_(noise(10, 4))
    base = plain_linear(noise(10, 6), noise(10) if bias else None)
    return ElasticLinear(base, adapter, dropout).train()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cut", [(10, 6, 4), (7, 6, 4), (10, 3, 4), (7, 3, 2)])
def test_the_lean_layer_has_the_gradients_of_its_formula(bias, cut):
    layer = elastic_linear(bias=bias)
    rows, columns, rank = layer.size.rows, layer.size.columns, layer.size.rank = cut
    x = torch.randn(2, 3, columns, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, rows, dtype=torch.float64)
    (layer(x) * weights).sum().backward()
    A, B = (p.detach().clone().requires_grad_() for p in (layer.adapter.A, layer.adapter.B))
    again = x.detach().clone().requires_grad_()
    y = F.linear(again, layer.weight, layer.bias)
    y = y + F.linear(F.linear(again, A[:rank, :columns]), 3.0 * B[:rows, :rank])
    (y * weights).sum().backward()
    pairs = ((x, again), (layer.adapter.A, A), (layer.adapter.B, B))
    for mine, formula in pairs:
        assert formula.grad.abs().max() > 0.1
        torch.testing.assert_close(mine.grad, formula.grad, rtol=1e-12, atol=1e-12)
    assert not layer.adapter.A.grad[rank:].any() and not layer.adapter.A.grad[:, columns:].any()
    assert not layer.adapter.B.grad[rows:].any() and not layer.adapter.B.grad[:, rank:].any()


@pytest.mark.parametrize("dropout", [0.0, 1e-9])  # the lean layer, and the composed one
def test_a_pass_goes_back_through_what_was_active(dropout):
    layer = elastic_linear(bias=True, dropout=dropout)
    layer.size.rows, layer.size.columns = 7, 3
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    layer.size.rows, layer.size.columns = 10, 6
    y.sum().backward()
    A, B = layer.adapter.A[:, :3], 3.0 * layer.adapter.B[:7]
    expected = (layer.base.weight[:7, :3] + B @ A).sum(0).expand(4, 3)
    torch.testing.assert_close(x.grad, expected.detach())


def test_the_lean_layer_passes_gradcheck():
    layer = elastic_linear(bias=True)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_dropout_acts_on_the_update_alone_and_only_in_training():
    layer = elastic_linear(bias=True, dropout=0.5)
    x = torch.randn(4, 6, dtype=torch.float64)
    still = copy.deepcopy(layer).eval()
    assert torch.equal(still(x), still(x)) and not torch.equal(layer(x), layer(x))
    without = nn.Linear(6, 10, dtype=torch.float64)
    without.weight, without.bias = layer.base.weight, layer.base.bias
    nn.init.zeros_(layer.adapter.B)
    torch.testing.assert_close(layer(x), without(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_followed_in_both_passes(dtype):
    """A node of its own would not see autocast in its backward pass."""
    layer = elastic_linear(bias=True).float()
    x = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert layer.adapter.A.grad.dtype == x.grad.dtype == torch.float32


# The loss.


LABELS = torch.tensor([[IGNORED, 2, 0], [IGNORED, IGNORED, 3]])


def test_the_loss_is_cross_entropy_of_answer_tokens():
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = -sum(
        logits[row, column].log_softmax(-1)[LABELS[row, column]]
        for row, column in ((0, 1), (0, 2), (1, 2))
    )
    torch.testing.assert_close(answer_loss(logits, LABELS), expected)
    torch.testing.assert_close(answer_loss(logits, LABELS, logits, 0.0), expected)


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_distillation_pulls_to_the_teacher(weight):
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    teacher = torch.randn(2, 3, 5, dtype=torch.float64)
    kept = LABELS != IGNORED
    p, q = teacher[kept].softmax(-1), logits[kept].softmax(-1)
    divergence = (p * (p / q).log()).sum()
    expected = (1 - weight) * answer_loss(logits, LABELS) + weight * divergence
    torch.testing.assert_close(answer_loss(logits, LABELS, teacher, weight), expected)
    alike = answer_loss(logits, LABELS, logits, weight)
    torch.testing.assert_close(alike, (1 - weight) * answer_loss(logits, LABELS))


# Which examples.


LENGTHS = st.lists(st.integers(1, 700), min_size=1, max_size=300)


@given(LENGTHS, st.integers(1, 40), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_visits_every_example_once(lengths, step, seed, epoch):
    order = SimilarLengths(lengths, step, seed, lambda: epoch)
    found = list(order)
    assert sorted(found) == list(range(len(lengths))) and len(order) == len(found)
    assert list(order) == found


def test_epochs_and_seeds_differ():
    lengths = [n % 37 + 3 for n in range(400)]
    runs = [
        list(SimilarLengths(lengths, 16, seed, lambda epoch=epoch: epoch))
        for seed, epoch in itertools.product(range(3), range(3))
    ]
    assert len({tuple(run) for run in runs}) == 9
    steps = [{frozenset(run[i : i + 16]) for i in range(0, 400, 16)} for run in runs]
    assert len(steps[0] & steps[1]) < 3  # the mixture is another one, not only its order


def test_a_step_holds_similar_lengths_and_long_ones_come_at_any_time():
    lengths = [(n * 7919) % 97 + 8 for n in range(2048)]
    order = list(SimilarLengths(lengths, 16, 0, lambda: 0))
    longest = [max(lengths[i] for i in order[at : at + 16]) for at in range(0, 2048, 16)]
    tokens = sum(16 * padded(length) for length in longest)
    assert tokens < 1.2 * sum(lengths)  # in random order 1.7 times as many
    half = len(longest) // 2
    early, late = sum(longest[:half]) / half, sum(longest[half:]) / half
    assert abs(early - late) < 10
    window = [padded(length) for length in longest[:32]]
    assert window != sorted(window)  # nor do they rise within a window


@given(st.integers(1, 100_000))
def test_padding_is_small_and_lengths_are_few(length):
    found = padded(length)
    assert length <= found < length + max(8, length / 8) and found % 8 == 0
    assert padded(found) == found


def test_there_are_eight_lengths_to_a_doubling():
    for top in (256, 512, 4096):
        assert len({padded(n) for n in range(top + 1, 2 * top + 1)}) == 8


def test_a_step_is_the_mean_of_the_sub_adapters_it_visits(tiny_folder, tmp_path, monkeypatch):
    compute_loss, seen = ElasticTrainer.compute_loss, []

    def loss(self, model, inputs, *args, **kwargs):
        value = compute_loss(self, model, inputs, *args, **kwargs)
        with torch.no_grad():
            logits, labels = answer_logits(model, inputs)
        seen.append((value.item(), answer_loss(logits, labels) / (labels != IGNORED).sum()))
        return value

    monkeypatch.setattr(ElasticTrainer, "compute_loss", loss)
    stage = StageConfig(train_dims=["rank", "width", "heads"])
    run = train_one(
        train_config(tiny_folder, tmp_path / "run", sampling="sandwich", stages=[stage])
    )
    logged = json.loads(run.metrics.read_text().splitlines()[0])["loss"]
    first = seen[:3]
    assert len({whole.item() for _, whole in first}) == 3
    assert logged == pytest.approx(sum(whole.item() for _, whole in first) / 3, rel=1e-5)
    for value, whole in first:
        assert value == pytest.approx(whole.item() / 3, rel=1e-5)
