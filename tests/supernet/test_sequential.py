"""A compact model fitted to the full one, block after block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from elastic.models.meter import Meter
from elastic.models.modules import plain_linear
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.depth import renamed
from elastic.supernet.least_squares import RIDGES, Sums
from elastic.supernet.sequential import (
    _Recorded,
    _stacks,
    can_fit,
    fit_,
    fit_streamed_,
)
from elastic.supernet.streaming import streamed
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import FAMILIES, model_of, net_of
from tests.helpers.laws import pair, without_data


def batches_of(net: Supernet, number: int = 4) -> list[dict[str, torch.Tensor]]:
    """As `collate` makes them: left-padded, with answers where the model has a decoder of its
    own."""
    found = []
    for seed in range(number):
        ids = tiny.tokens(batch=8, length=12, seed=seed)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if net.model.config.is_encoder_decoder:
            batch["labels"] = tiny.tokens(batch=8, length=5, seed=seed + 100)
        found.append(batch)
    return found


def errors(small, net, sub, batches) -> dict[str, float]:
    """By list of blocks, how far what leaves its last block is from the full model's."""
    found = {}
    with torch.no_grad(), net.active(net.space.maximal()):
        for blocks in _stacks(net):
            whole, cut = (_Recorded(model, blocks, batches) for model in (net.model, small))
            for number in range(len(net.model.get_submodule(blocks))):
                goals = whole.run(f"{blocks}.{number}")
                if mine := renamed(net.space.kept(sub), f"{blocks}.{number}"):
                    own = cut.run(mine)
            pairs = zip(own, goals, strict=True)
            found[blocks] = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return found


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "rwkv"])
def test_what_leaves_the_blocks_comes_nearer_to_the_full_model(family):
    net = net_of(family)
    sub, batches = net.space.minimal(), batches_of(net)
    small = compact(net, sub)
    before = errors(small, net, sub, batches)
    changed = fit_(small, net, sub, batches)
    after = errors(small, net, sub, batches)
    assert changed
    assert all(after[blocks] < before[blocks] for blocks in before)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "rwkv"])
def test_fitted_where_neither_is_in_memory_it_is_the_same(family, tmp_path):
    base, net, bare = pair(family)
    sub, batches = net.space.minimal(), batches_of(net)
    expected = compact(net, sub)
    changed = fit_(expected, net, sub, batches)
    small, whole = (streamed(base, bare, one) for one in (sub, net.space.maximal()))
    assert fit_streamed_(small, whole, bare, sub, batches, tmp_path) == changed
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(small.tensors[name](), tensor, rtol=1e-4, atol=1e-6)
    assert all(tensor.is_meta for tensor in small.model.state_dict().values())


def test_of_a_model_that_is_not_in_memory_a_block_of_each_is(tmp_path):
    """Beside what stands outside of the blocks, and what the examples leave between two blocks."""
    base = model_of("llama", layers=12)
    space = SearchSpace.load(FAMILIES["llama"][1])
    net = Supernet(copy.deepcopy(base), space, tiny.ADAPTERS["lora"])
    bare = without_data(base, net, space, "lora", tiny.permutations(net))
    sub, batches = net.space.minimal(), batches_of(net, 2)
    small, whole = (streamed(base, bare, one) for one in (sub, net.space.maximal()))
    everything = sum(t.nbytes for one in (small, whole) for t in one.model.state_dict().values())
    held = [*base.state_dict().values(), *net.factor_state().values(), *bare.model.parameters()]
    with Meter(held).recording() as meter:
        fit_streamed_(small, whole, bare, sub, batches, tmp_path)
    assert meter.peak < everything / 2


def test_a_model_that_lost_nothing_is_left_alone():
    net = net_of("llama")
    sub = net.space.maximal()
    small = compact(net, sub)
    before = copy.deepcopy(small.state_dict())
    assert not fit_(small, net, sub, batches_of(net))
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_the_supernet_and_what_it_shares_are_left_alone():
    net = net_of("llama")
    before = copy.deepcopy(net.model.state_dict())
    sub = net.space.minimal()
    assert fit_(compact(net, sub), net, sub, batches_of(net))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.model.state_dict().items())
    assert net.current == net.space.maximal()


def test_blocks_that_are_left_out_are_made_up_for_too():
    value = tiny.space_dict(heads=False)
    value["groups"]["depth"] = {"dim": "depth", "choices": [1.0, 0.5], "drop_ends": True}
    space = SearchSpace.from_dict(value)
    net = Supernet(model_of("llama", layers=4), space, tiny.ADAPTERS["lora"])
    net.reorder(tiny.permutations(net))
    tiny.randomize_(net)
    sub, batches = net.space.minimal(), batches_of(net)
    small = compact(net, sub)
    before = errors(small, net, sub, batches)
    assert fit_(small, net, sub, batches) > 0
    after = errors(small, net, sub, batches)
    assert all(after[blocks] < 0.9 * before[blocks] for blocks in before)


def test_recurrent_models_are_not_fitted():
    assert not can_fit(model_of("rwkv"))
    assert can_fit(model_of("llama"))


# One layer


def layer_of(bias: bool) -> nn.Linear:
    made = nn.Linear(5, 3, bias=bias).double()
    return plain_linear(made.weight.data, made.bias.data if bias else None)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_error_is_learnt(bias):
    generator = torch.Generator().manual_seed(0)
    layer = layer_of(bias)
    wanted = torch.randn(3, 5, generator=generator)
    shift = torch.randn(3, generator=generator) if bias else torch.zeros(3)
    sums = [Sums(layer.bias is not None), Sums(layer.bias is not None)]
    for each in sums:
        h = torch.randn(4000, 5, generator=generator)
        each.add(h, h @ wanted.T + shift)
    before = layer.weight.clone(), None if layer.bias is None else layer.bias.clone()
    assert sums[0].solve_(layer, held_out=sums[1])
    ratio = 1 / (1 + min(RIDGES) / len(h))
    torch.testing.assert_close(layer.weight - before[0], ratio * wanted.double(), rtol=0, atol=0.05)
    if bias:
        torch.testing.assert_close(layer.bias - before[1], shift.double(), rtol=0, atol=0.05)


def test_noise_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    layer = layer_of(bias=False)
    sums = [Sums(layer.bias is not None), Sums(layer.bias is not None)]
    for each in sums:
        each.add(torch.randn(6, 5, generator=generator), torch.randn(6, 3, generator=generator))
    before = layer.weight.clone()
    assert not sums[0].solve_(layer, held_out=sums[1])
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_inputs_that_are_no_numbers_or_nothing_change_nothing(value):
    layer = layer_of(bias=False)
    sums = [Sums(layer.bias is not None), Sums(layer.bias is not None)]
    for each in sums:
        each.add(torch.full((8, 5), value), torch.ones(8, 3))
    before = layer.weight.clone()
    assert not sums[0].solve_(layer, held_out=sums[1])
    assert torch.equal(layer.weight, before)
