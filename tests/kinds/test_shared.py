"""A choice may be a layer's own, a block's or the whole model's."""

import pytest
import torch
import yaml

from elastic.errors import ConfigError
from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.importance import channel_order
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.laws import close, one_function, several

LAYERS = 2


def declared() -> dict:
    value = tiny.space_dict(heads=True)
    value["groups"]["attention_rank"]["share"] = "layer"
    for name in ("mlp_width", "mlp_rank", "attention_heads"):
        value["groups"][name]["share"] = "model"
    return value


def net_of() -> Supernet:
    net = Supernet(tiny.llama(), SearchSpace.from_dict(declared()), tiny.ADAPTERS["lora"])
    net.reorder(tiny.permutations(net))
    return tiny.randomize_(net)


def test_there_is_a_group_for_each_choice():
    space = SearchSpace.from_dict(declared())
    assert (
        SearchSpace.from_dict(yaml.safe_load(yaml.safe_dump(space.as_dict(), sort_keys=False)))
        == space
    )
    assert space.as_dict() == declared()
    bound, plain = (s.bind(tiny.llama(), tiny.RANK) for s in (space, tiny.space(heads=True)))
    own = [f"model.layers.{n}.attention_rank.self_attn.{k}_proj" for n in range(2) for k in "qkv"]
    everywhere = [f"model.layers.*.{n}" for n in ("mlp_width", "mlp_rank", "attention_heads")]
    assert {group.name for group in bound} == {*own, *everywhere}
    cuts = {cut for group in bound for cut in group.cuts}
    assert cuts == {cut for group in plain for cut in group.cuts}
    assert bound.size == 3 ** len(own) * 4 * 3 * 2


def test_active_sliced_and_merged_are_one_function():
    net = net_of()
    ids = tiny.tokens()
    seen = []
    for sub in several(net):
        expected, small = one_function(net, sub, lambda model: tiny.logits(model, ids), 1e-12)
        widths = {layer.mlp.up_proj.out_features for layer in small.model.layers}
        assert widths == {sub["model.layers.*.mlp_width"]}
        seen.append(expected)
    assert not torch.allclose(seen[0], seen[1])


def test_a_shared_choice_is_that_choice_in_every_block():
    net, plain = net_of(), tiny.supernet(heads=True)
    plain.reorder({name.replace("*", str(n)): order
                   for name, order in net.order.items() for n in range(LAYERS)})  # fmt: skip
    plain.load_factors(net.factor_state())
    sub = net.space.minimal()
    choices = {}
    for group in plain.space:
        block, _, name = group.name.rpartition(".")
        key = f"{block}.attention_rank.self_attn.q_proj" if name == "attention_rank" else None
        choices[group.name] = sub[key or f"model.layers.*.{name}"]
    with net.active(sub), plain.active(SubAdapter(tuple(choices.items()))):
        close(tiny.logits(net.model, tiny.tokens()), tiny.logits(plain.model, tiny.tokens()), 1e-12)


def test_a_shared_width_is_ordered_by_all_blocks_together():
    model = tiny.llama()
    bound = SearchSpace.from_dict(declared()).bind(model, tiny.RANK)
    batch = {"input_ids": tiny.tokens()}
    with torch.no_grad():  # a channel that matters in the second block alone
        model.model.layers[1].mlp.down_proj.weight[:, 5] *= 1e4
    order = channel_order(model, bound, "activation", [batch])
    assert set(order) == {"model.layers.*.mlp_width", "model.layers.*.attention_heads"}
    assert order["model.layers.*.mlp_width"][0] == 5


def test_what_cannot_be_shared_is_named():
    value = declared()
    value["groups"]["mlp_width"]["share"] = "layer"
    with pytest.raises(ConfigError, match=r"group 'mlp_width': unknown share 'layer'"):
        SearchSpace.from_dict(value)
    value["groups"]["mlp_width"]["share"] = "al"
    with pytest.raises(ConfigError, match="unknown share 'al'"):
        SearchSpace.from_dict(value)
    net = tiny.supernet(heads=True)
    mixed = net.space.maximal().as_dict() | {"model.layers.1.mlp_width": 32}
    uneven = compact(net, SubAdapter(tuple(mixed.items())))
    with pytest.raises(ConfigError, match=r"group 'mlp_width': share model: blocks have \["):
        SearchSpace.from_dict(declared()).bind(uneven, tiny.RANK)
