"""Key-value heads are chosen, and how many query heads each of them keeps."""

import copy
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

from elastic.adapters.layers import ElasticLinear
from elastic.config import MergeAdapterConfig, MergeConfig, StageConfig
from elastic.errors import ConfigError
from elastic.exporting.foreign import Update
from elastic.exporting.merge import combine
from elastic.formats import hf, peft
from elastic.models.modules import modules_of
from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.group_importance import group_importance
from elastic.supernet.importance import channel_order
from elastic.supernet.supernet import Supernet
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.exports import mixed_ranks
from tests.helpers.families import ROUNDED, model_of, output
from tests.helpers.graphs import same_in_every_runtime
from tests.helpers.laws import batch_of, close, one_function, same, some_moments, without_data
from tests.helpers.tiny_runs import space_file, train_config

KEYS, QUERIES, SIZE = 3, 4, 4
GRID = {"hidden_size": 48, "num_attention_heads": KEYS * QUERIES, "num_key_value_heads": KEYS,
        "head_dim": SIZE, "attention_bias": True}  # fmt: skip
WHOLE = {"dim": "heads", "outputs": tiny.ATTENTION, "inputs": ["self_attn.o_proj"],
         "choices": [3, 2, 1]}  # fmt: skip
WITHIN = {"dim": "query_heads", "outputs": ["self_attn.q_proj"], "inputs": ["self_attn.o_proj"],
          "choices": [4, 3, 2, 1]}  # fmt: skip
ATTENTION = "model.layers.0.self_attn"


def declared(**more) -> dict:
    value = tiny.space_dict()
    value["adapt"].append("self_attn.o_proj")
    value["groups"] |= {"heads": WHOLE, "queries": WITHIN} | more
    return value


def orders(net_or_space, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random one of the key-value heads, and of the query heads of each; of all others, too."""
    draw = torch.Generator().manual_seed(seed)
    bound = getattr(net_or_space, "space", net_or_space)
    own = {
        group.name: torch.stack([torch.randperm(QUERIES, generator=draw) for _ in range(KEYS)])
        for group in bound
        if group.dim == "query_heads"
    }
    return tiny.permutations(bound, seed) | own


def net_of(dtype=torch.float64, method="lora", seed=0, **more) -> Supernet:
    space = SearchSpace.from_dict(declared(**more))
    layers = 4 if "depth" in more else 2
    base = tiny.llama(dtype=dtype, num_hidden_layers=layers, **GRID)
    net = Supernet(base, space, tiny.ADAPTERS[method])
    net.reorder(orders(net, seed))
    return tiny.randomize_(net, seed)


def with_sizes(net: Supernet, heads: int, queries: int) -> SubAdapter:
    sizes = {"heads": heads, "query_heads": queries}
    chosen = tuple((g.name, sizes.get(g.dim, g.choices[0])) for g in net.space)
    return net.space.check(SubAdapter(chosen))


NET = net_of()
DEEP = net_of(depth={"dim": "depth", "choices": [4, 3, 2]})
for each in (NET, DEEP):
    each.compensation = some_moments(each)


@given(st.randoms(use_true_random=False), st.sampled_from([NET, DEEP]), st.sampled_from([0.0, 0.5]))
def test_active_sliced_merged_and_written_are_one_function(
    tmp_path_factory, generator, net, degree
):
    ids, sub = tiny.tokens(), net.space.random(generator)
    expected, small = one_function(net, sub, lambda model: tiny.logits(model, ids), 1e-12, degree)
    again = hf.load(hf.write(small, None, tmp_path_factory.mktemp("hf")), torch.float64)
    for attention in ("sdpa", "eager"):  # only the latter asks the module
        again.set_attn_implementation(attention)
        close(tiny.logits(again, ids), expected, 1e-5)


@pytest.mark.parametrize("heads, queries", list(itertools.product([3, 2, 1], [4, 3, 2, 1])))
def test_layers_have_the_heads_chosen(heads, queries):
    attention = compact(NET, with_sizes(NET, heads, queries)).get_submodule(ATTENTION)
    shapes = {name: tuple(layer.weight.shape) for name, layer in attention.named_children()}
    assert shapes == {
        "q_proj": (heads * queries * SIZE, 48), "o_proj": (48, heads * queries * SIZE),
        "k_proj": (heads * SIZE, 48), "v_proj": (heads * SIZE, 48),
    }  # fmt: skip
    assert attention.num_key_value_groups == queries


def test_all_queries_of_some_key_value_heads_are_a_view():
    layer = NET.layer(f"{ATTENTION}.q_proj")
    for queries, view in ((4, True), (3, False)):
        with NET.active(with_sizes(NET, 2, queries)):
            assert len(layer.weight) == 2 * queries * SIZE
            assert (layer.weight.data_ptr() == layer.base.weight.data_ptr()) is view


@settings(max_examples=10)
@given(st.integers(0, 99), st.integers(1, KEYS), st.integers(1, QUERIES))
def test_the_most_important_query_heads_of_the_most_important_groups_stay(seed, heads, queries):
    """Against the base model, from whose attention all other heads are taken away; all of them
    there, that is the base model itself."""
    base, ids = tiny.llama(**GRID), tiny.tokens()
    space = SearchSpace.from_dict(declared())
    net = Supernet(copy.deepcopy(base), space, tiny.ADAPTERS["lora"])  # whose update is still 0
    order = orders(net, seed)
    net.reorder(order)
    with net.active(with_sizes(net, heads, queries)):
        found = tiny.logits(net.model, ids)
    for number, layer in enumerate(base.model.layers):
        stays = torch.zeros(KEYS, QUERIES, SIZE, dtype=torch.float64)
        for key in order[f"model.layers.{number}.heads"][:heads]:
            stays[key, order[f"model.layers.{number}.queries"][key][:queries]] = 1
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, x, stays=stays: (x[0] * stays.flatten(),)
        )
    close(found, tiny.logits(base, ids), 1e-12)


@pytest.mark.parametrize("mode", ["activation", "norm"])
def test_both_orders_are_measured(mode):
    model = tiny.llama(**GRID)
    attention = model.get_submodule(ATTENTION)
    size = torch.tensor([[1, 2, 4, 3], [80, 20, 10, 40], [20, 5, 10, 40]], dtype=torch.float64)
    for layer, axis in ((attention.q_proj, 0), (attention.o_proj, 1)):
        weight = layer.weight.data.movedim(axis, 0)
        weight *= size.repeat_interleave(SIZE).unsqueeze(1) / weight.abs().sum(1, keepdim=True)
    space = SearchSpace.from_dict(declared())
    order = channel_order(model, space.bind(model, tiny.RANK), mode, [{"input_ids": tiny.tokens()}])
    assert order["model.layers.0.heads"].tolist() == [1, 2, 0]
    if mode == "norm":
        assert order["model.layers.0.queries"].tolist() == [
            [2, 3, 1, 0],
            [0, 3, 1, 2],
            [3, 0, 2, 1],
        ]
    for name in ("heads", "queries"):
        value = declared()
        del value["groups"][name]
        bound = SearchSpace.from_dict(value).bind(model, tiny.RANK)
        for key, found in channel_order(model, bound, mode, [{"input_ids": tiny.tokens()}]).items():
            assert torch.equal(found, order[key]), key


def test_the_importance_of_each_is_what_it_is_without_the_other():
    batch = batch_of("abc")
    both = group_importance(NET, [batch])
    for name in ("heads", "queries"):
        value = declared()
        del value["groups"][name]
        net = Supernet(tiny.llama(**GRID), SearchSpace.from_dict(value), tiny.ADAPTERS["lora"])
        for site, layer in modules_of(net.model, ElasticLinear):
            layer.load_state_dict(NET.layer(site).state_dict())  # in the order of both
        for key, found in group_importance(net, [batch]).items():
            assert found == pytest.approx(both[key], rel=1e-9), key


@pytest.mark.parametrize("family", ["llama, tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2"])
def test_families_that_share_keys(family, tmp_path):
    groups = {"heads": WHOLE | {"choices": [2, 1]}, "queries": WITHIN | {"choices": [2, 1]}}
    value = {"blocks": "model.layers.*", "adapt": ["self_attn.q_proj"], "groups": groups}
    net = Supernet(model_of(family), SearchSpace.from_dict(value), tiny.ADAPTERS["lora"])
    net.reorder(tiny.permutations(net))
    tiny.randomize_(net)
    precision = 1e-5 if family in ROUNDED else 1e-10
    generator = random.Random(1)
    for number in range(3):
        expected, small = one_function(
            net, net.space.random(generator), lambda model: output(model).detach(), precision
        )
        folder = hf.write(small, None, tmp_path / str(number))
        close(output(hf.load(folder, torch.float64)), expected, precision)


@pytest.mark.parametrize("heads, queries, plain", [(2, 2, True), (1, 4, True), (3, 3, False)])
def test_uniform_ones_are_the_family_s_own_class(tmp_path, heads, queries, plain):
    """Where the config may say so: Llama's wants the hidden size to be a multiple of the heads."""
    small = compact(NET, with_sizes(NET, heads, queries))
    folder = hf.write(small, None, tmp_path)
    again = hf.load(folder, torch.float64)
    close(output(again), output(small), 1e-5)
    assert (not (folder / hf.CODE).exists()) is plain
    if plain:
        counts = again.config.num_attention_heads, again.config.num_key_value_heads
        assert counts == (heads * queries, heads)


def test_every_runtime_computes_the_same(tmp_path):
    """Layers unlike each other: two key-value heads of three query heads, one of two."""
    net = net_of(torch.float32)
    chosen = with_sizes(net, 2, 3).as_dict() | {
        "model.layers.1.heads": 1,
        "model.layers.1.queries": 2,
    }
    same_in_every_runtime(compact(net, SubAdapter(tuple(chosen.items()))), tmp_path)


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_peft_gets_every_channel_back_where_it_was(tmp_path, method):
    net = net_of(method=method)
    ids, sub = tiny.tokens(), mixed_ranks(net)
    folder = peft.write(net, sub, tmp_path, base_model="tiny")
    model = PeftModel.from_pretrained(tiny.llama(**GRID), str(folder)).double().eval()
    with net.active(sub):
        expected = tiny.logits(net.model, ids)
    close(tiny.logits(model, ids), expected, 1e-6)
    assert peft.why_not(net, with_sizes(net, 2, 4)) and peft.why_not(net, with_sizes(net, 3, 1))


def test_adapters_from_elsewhere_are_cut_the_same_way():
    net, sub = net_of(), with_sizes(NET, 2, 3)
    deltas = {
        f"{ATTENTION}.{name}.weight": torch.randn(
            net.layer(f"{ATTENTION}.{name}").base.weight.shape, dtype=torch.float64
        )
        for name in ("q_proj", "k_proj", "o_proj")
    }
    config = MergeConfig(adapters=[MergeAdapterConfig(path="theirs")])
    found, _ = combine(net, sub, [Update("theirs", "peft lora", deltas)], config)
    base = tiny.llama(**GRID)
    for name, delta in deltas.items():
        base.get_parameter(name).data += delta
    other = Supernet(base, net.declared, tiny.ADAPTERS["lora"], order=net.order, start=False)
    other.load_factors(net.factor_state())
    close(output(found), output(compact(other, sub)), 1e-10)


def test_tensors_made_one_at_a_time_are_the_same():
    base, space = tiny.llama(**GRID), SearchSpace.from_dict(declared())
    net = Supernet(copy.deepcopy(base), space, tiny.ADAPTERS["lora"])
    order = orders(net)
    net.reorder(order)
    tiny.randomize_(net)
    bare = without_data(base, net, space, "lora", order)
    same(base, net, bare)


def test_both_are_trained_in_stages(tmp_path):
    base = tiny.save_tiny(tmp_path / "base", **GRID)
    dims = ["rank", "width", "heads", "query_heads"]
    stages = [StageConfig(train_dims=dims[:count]) for count in (3, 4)]
    space = space_file(tmp_path, declared())
    run = train_one(train_config(base, tmp_path / "run", space=space, stages=stages))
    order = load_file(run.super_adapter / "order.safetensors")
    assert order["model.layers.0.heads"].shape == (KEYS,)
    assert order["model.layers.0.queries"].shape == (KEYS, QUERIES)


@pytest.mark.parametrize("again", [WHOLE, WITHIN])
def test_one_axis_has_one_group_of_each_kind(again):
    space = SearchSpace.from_dict(declared(again=again))
    with pytest.raises(ConfigError, match=r"q_proj \(out\) is cut by both"):
        space.bind(tiny.llama(**GRID), tiny.RANK)
