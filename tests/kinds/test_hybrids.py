"""Families whose blocks are of several kinds: what is found in them obeys the laws."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from elastic.errors import ConfigError
from elastic.formats import hf
from elastic.spaces.declared import SearchSpace
from elastic.spaces.dims import places
from elastic.supernet.discovery import discover
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import output
from tests.helpers.hybrids import HYBRIDS, hybrid, runnable_
from tests.helpers.laws import close, one_function

ALTERNATING = ["linear_attention", "full_attention"]
GENERATED = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": tiny.PAD}
PRECISION = 1e-5
"""Norms, routers and scans round to float32, whatever the type."""


@pytest.mark.parametrize("family", HYBRIDS)
def test_active_sliced_merged_and_reloaded_are_one_function(family, tmp_path):
    base = hybrid(family)
    net = Supernet(hybrid(family), discover(base), tiny.ADAPTERS["lora"])
    with torch.no_grad():
        net.reorder(tiny.permutations(net))
        full = output(base)
        close(output(net.model), full, PRECISION)
        tiny.randomize_(net)
        for sub in (net.space.minimal(), net.space.random(random.Random(1))):
            expected, small = one_function(net, sub, output, PRECISION)
            assert (expected - full).abs().max() > 1e-3 * full.abs().max()
        again = runnable_(hf.load(hf.write(small, None, tmp_path), torch.float64))
        close(output(again), expected, PRECISION)
        with net.active(sub):
            tokens = net.model.generate(tiny.tokens(2, 6), **GENERATED)
        assert torch.equal(small.generate(tiny.tokens(2, 6), use_cache=False, **GENERATED), tokens)
        assert torch.equal(again.generate(tiny.tokens(2, 6), **GENERATED), tokens)


DEEP = {
    "deepseek-v3": {"num_hidden_layers": 6, "first_k_dense_replace": 3},
    "llama4": {"num_hidden_layers": 7, "no_rope_layers": [1, 0, 1, 1, 0, 1, 0]},
    "qwen3-next": {"num_hidden_layers": 7, "layer_types": ALTERNATING * 3 + ALTERNATING[:1]},
    "lfm2": {"num_hidden_layers": 7, "layer_types": ["conv", "full_attention"] * 3 + ["conv"]},
    "bamba": {"num_hidden_layers": 7, "attn_layer_indices": [1, 3, 5]},
    "afmoe": {"num_hidden_layers": 6, "num_dense_layers": 3, "global_attn_every_n_layers": 2},
    "jamba": {"num_hidden_layers": 6, "expert_layer_period": 7, "expert_layer_offset": 6},
}
"""How the configuration says which block is of which kind: how many first ones, by list, by
number; Jamba's by a rule."""


def with_depths(family: str, choices: list) -> tuple[PreTrainedModel, SearchSpace]:
    """What is found, and how many blocks of each kind run."""
    base = hybrid(family, **DEEP[family])
    sections = discover(base).as_dict()
    for section in sections:
        section["groups"]["depth"] = {"dim": "depth", "choices": choices}
    return base, SearchSpace.from_dict(sections)


@pytest.mark.parametrize("family", [family for family in DEEP if family != "jamba"])
def test_blocks_of_every_kind_may_be_left_out(family, tmp_path):
    base, space = with_depths(family, [1.0, 2])
    blocks = {number: type_of(block) for number, block in enumerate(base.model.layers)}
    net = Supernet(base, space, tiny.ADAPTERS["lora"])
    orders = tiny.permutations(net)
    for group in net.space.depths:  # of those that may go, the last ones stay
        own = sorted(places(group.blocks))
        ends = sorted(places(group.blocks)[: group.staying])
        orders[group.name] = torch.tensor([*ends, *(n for n in reversed(own) if n not in ends)])
    net.reorder(orders)
    tiny.randomize_(net)
    sub = net.space.minimal()
    [kept] = net.space.kept(sub).values()
    assert len(kept) == 4 and [0, len(blocks) - 1] == [kept[0], kept[-1]]
    with torch.no_grad():
        full = output(net.model)
        expected, small = one_function(net, sub, output, PRECISION)
        assert (expected - full).abs().max() > 1e-3 * full.abs().max()
        close(output(net.model), full, 1e-12)  # as before
        assert [type_of(block) for block in small.model.layers] == [blocks[n] for n in kept]
        again = runnable_(hf.load(hf.write(small, None, tmp_path), torch.float64))
        close(output(again), expected, PRECISION)
        with net.active(sub):
            tokens = net.model.generate(tiny.tokens(2, 6), **GENERATED)
        assert torch.equal(small.generate(tiny.tokens(2, 6), use_cache=False, **GENERATED), tokens)
        assert torch.equal(again.generate(tiny.tokens(2, 6), **GENERATED), tokens)


def type_of(block: nn.Module) -> list[str]:
    """What it is made of."""
    return sorted(type(module).__name__ for module in block.children())


def test_blocks_of_a_kind_that_a_rule_gives_stay():
    """Attention in every second block, whatever runs."""
    base, space = with_depths("jamba", [1.0, 2])
    with pytest.raises(ConfigError, match=r"built otherwise.*by a rule that knows no gaps"):
        space.bind(base, tiny.RANK)


def test_kinds_of_one_list_go_in_orders_of_their_own():
    base, space = with_depths("lfm2", [1.0, 2])
    order = {"model.layers.{0,2,4,6}.depth": [3, 0, 2, 1], "model.layers.{1,3,5}.depth": [1, 2, 0]}
    bound = space.bind(base, tiny.RANK)
    bound = bound.ordered({name: torch.tensor(places) for name, places in order.items()})
    assert bound.kept(bound.minimal()) == {"model.layers": [0, 3, 5, 6]}
    assert sorted(bound.left_out(bound.minimal())) == [f"model.layers.{n}." for n in (1, 2, 4)]
    assert bound.indices(bound.minimal()) == {
        group.name: 0 if bound.minimal()[group.name] == 0 else len(group.choices) - 1
        for group in bound
    }
