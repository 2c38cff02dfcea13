"""Every family that a space is shipped for: bound, cut, merged and counted as the laws have it."""

from __future__ import annotations

import random

import pytest
import torch

from elastic.errors import ConfigError
from elastic.formats import hf
from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import FAMILIES, ROUNDED, model_of, net_of, output
from tests.helpers.laws import close, every_factor_learns, one_function, several

BLOOM = ("self_attention.query_key_value", "self_attention.dense")
FIXED_WIDTH = {"bloom"}
"""Families whose configuration does not say how wide the MLP is."""


@pytest.mark.parametrize("family", FAMILIES)
def test_active_sliced_and_merged_are_one_function(family):
    net = net_of(family)
    precision = 1e-5 if family in ROUNDED else 1e-10
    with torch.no_grad():
        full = output(net.model)
        for sub in several(net, draws=1):
            expected, _ = one_function(net, sub, output, precision)
            if sub != net.space.maximal():
                assert (expected - full).abs().max() > 1e-3 * full.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_channels_leaves_the_base_model_as_it_is(family):
    expected = output(model_of(family))
    net = Supernet(model_of(family), SearchSpace.load(FAMILIES[family][1]), tiny.ADAPTERS["lora"])
    net.reorder(tiny.permutations(net))
    close(output(net.model), expected, 1e-5 if family in ROUNDED else 1e-10)
    assert any(torch.any(order != torch.arange(len(order))) for order in net.order.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_model_is_the_same_function(family, tmp_path):
    """Of one width in all layers, where the class's own config can say it, and of many."""
    net = net_of(family)
    uniform = {group.name: group.choices[-1 if group.dim == "width" else 0] for group in net.space}
    mixed = net.space.random(random.Random(3)).as_dict()
    for number, choices in enumerate((uniform, mixed)):
        model = compact(net, SubAdapter(tuple(choices.items())))
        folder = hf.write(model, None, tmp_path / str(number))
        again = hf.load(folder, torch.float64)
        close(output(again), output(model), 1e-10)
        plain = not (folder / hf.CODE).exists()
        assert plain is (number == 0 and family not in FIXED_WIDTH)
        assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 1.1 * sum(
            {p.data_ptr(): p.nbytes for p in model.state_dict().values()}.values()
        ) + 20_000  # fmt: skip


@pytest.mark.parametrize("kept, plain", [(4, True), (3, False)])
def test_uniform_heads_are_plain_where_the_config_may_say_so(tmp_path, kept, plain):
    """Llama's wants the hidden size, 80 here, to be a multiple of the number of heads."""
    sizes = {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5}
    model = tiny.llama(head_dim=16, **sizes)
    heads = {"dim": "heads", "outputs": tiny.ATTENTION, "inputs": ["self_attn.o_proj"],
             "choices": [5, kept]}  # fmt: skip
    space = {"blocks": "model.layers.*", "adapt": tiny.ATTENTION, "groups": {"heads": heads}}
    net = tiny.randomize_(Supernet(model, SearchSpace.from_dict(space), tiny.ADAPTERS["lora"]))
    small = compact(net, net.space.minimal())
    folder = hf.write(small, None, tmp_path)
    assert (not (folder / hf.CODE).exists()) is plain
    close(output(hf.load(folder, torch.float64)), output(small), 1e-5)  # norms round to float32


@pytest.mark.parametrize("family", FAMILIES)
def test_every_active_factor_gets_a_gradient(family):
    every_factor_learns(net_of(family), output)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dimension_of_its_space_is_elastic(family):
    space = SearchSpace.load(FAMILIES[family][1]).bind(model_of(family), tiny.RANK)
    assert all(len(group.choices) > 1 for group in space)
    layers = {group.name.rpartition(".")[0] for group in space}
    assert len(layers) >= 2


def test_a_fused_layer_keeps_the_first_of_each_of_its_parts():
    net = net_of("phi3")
    layer = net.layer("model.layers.1.mlp.gate_up_proj")
    whole = layer.base.weight.clone()
    with net.active(net.space.minimal()):
        half = layer.size.rows // 2
        gate, up = whole[:192][:half], whole[192:][:half]
        torch.testing.assert_close(layer.weight, torch.cat([gate, up]))


@pytest.mark.parametrize(
    "family, blocks, inside, outside, fused",
    [
        ("phi3", "model.layers.*", "self_attn.qkv_proj", "self_attn.o_proj", "parts"),
        ("opt", "model.decoder.layers.*", "self_attn.q_proj", "self_attn.out_proj", None),
        ("bloom", "transformer.h.*", *BLOOM, "heads"),
        ("falcon", "transformer.h.*", *BLOOM, "heads"),
        ("t5", "encoder.block.*.layer.0", "SelfAttention.q", "SelfAttention.o", None),
    ],
)  # fmt: skip
def test_heads_that_code_counts_on_are_refused(family, blocks, inside, outside, fused):
    group = {"dim": "heads", "outputs": [inside], "inputs": [outside], "choices": [1]}
    group |= {"fused": fused} if fused else {}
    declared = {"blocks": blocks, "adapt": [inside], "groups": {"heads": group}}
    with pytest.raises(ConfigError, match="counts on all its heads"):
        SearchSpace.from_dict(declared).bind(model_of(family), tiny.RANK)
