"""Every key-value head keeps its own most important query heads."""

from __future__ import annotations

import pytest
import torch

from elastic.config import MergeAdapterConfig, MergeConfig
from elastic.errors import ConfigError
from elastic.exporting.foreign import Update
from elastic.exporting.merge import combine
from elastic.formats import hf
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.group_importance import group_importance
from elastic.supernet.importance import channel_order
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import FAMILIES, ROUNDED, model_of, output
from tests.helpers.graphs import same_in_every_runtime
from tests.helpers.laws import STEP, batch_of, close, loss, one_function, several

QUERIES = {"dim": "query_heads", "outputs": ["self_attn.q_proj"], "inputs": ["self_attn.o_proj"],
           "choices": [4, 3, 1]}  # fmt: skip
GROUPED = {"num_attention_heads": 8, "head_dim": 4}
"""Two key-value heads, which four query heads share each."""
FIRST = "model.layers.0.queries"


def declared(**settings) -> dict:
    value = tiny.space_dict()
    value["adapt"].append("self_attn.o_proj")
    value["groups"]["queries"] = QUERIES | settings
    return value


def orders(net: Supernet) -> dict[str, torch.Tensor]:
    """One for each key-value head."""
    draw = torch.Generator().manual_seed(1)
    own = {
        group.name: torch.stack([torch.randperm(4, generator=draw) for _ in range(2)])
        for group in net.space
        if group.dim == "query_heads"
    }
    return tiny.permutations(net) | own


def net_of(dtype=torch.float64, ordered: bool = True, **settings) -> Supernet:
    space = SearchSpace.from_dict(declared(**settings))
    net = Supernet(tiny.llama(dtype=dtype, **GROUPED), space, tiny.ADAPTERS["lora"])
    if ordered:
        net.reorder(orders(net))
    return tiny.randomize_(net)


def test_active_sliced_merged_and_written_are_one_function(tmp_path):
    net, ids = net_of(), tiny.tokens()
    full = tiny.logits(net.model, ids)
    for number, sub in enumerate(several(net)):
        expected, small = one_function(net, sub, lambda model: tiny.logits(model, ids), 1e-12)
        again = hf.load(hf.write(small, None, tmp_path / str(number)), torch.float64)
        for attention in ("sdpa", "eager"):  # only the latter asks the module
            again.set_attn_implementation(attention)
            close(tiny.logits(again, ids), expected, 1e-5)
        assert number == 0 or (expected - full).abs().max() > 1e-3


def test_the_order_leaves_the_base_model_as_it_is():
    ids = tiny.tokens()
    space = SearchSpace.from_dict(declared())
    net = Supernet(tiny.llama(**GROUPED), space, tiny.ADAPTERS["lora"])
    expected = tiny.logits(net.model, ids)
    net.reorder(orders(net))
    assert len({tuple(row) for row in net.order[FIRST].tolist()}) == 2
    close(tiny.logits(net.model, ids), expected, 1e-12)


@pytest.mark.parametrize("family", ["llama, tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2"])
def test_families_that_share_keys(family):
    space = {"blocks": "model.layers.*", "adapt": ["self_attn.q_proj"],
             "groups": {"queries": QUERIES | {"choices": [1.0, 0.5]}}}  # fmt: skip
    net = Supernet(model_of(family), SearchSpace.from_dict(space), tiny.ADAPTERS["lora"])
    net.reorder(tiny.permutations(net))
    tiny.randomize_(net)
    with torch.no_grad():
        full = output(net.model)
        with net.active(net.space.minimal()):
            expected = output(net.model)
        found = output(compact(net, net.space.minimal()))
    close(found, expected, 1e-5 if family in ROUNDED else 1e-10)
    assert (expected - full).abs().max() > 1e-3
    assert FAMILIES[family][2]["num_key_value_heads"] == 2


@pytest.mark.parametrize("mode", ["activation", "norm"])
def test_every_key_value_head_has_an_order_of_its_own(mode):
    model = tiny.llama(**GROUPED)
    attention = model.model.layers[0].self_attn
    most = [2, 7]  # of the heads 0..3 and of 4..7
    for head in range(8):
        weight = attention.o_proj.weight.data[:, head * 4 : head * 4 + 4]
        rows = attention.q_proj.weight.data[head * 4 : head * 4 + 4]
        weight *= 10.0 if head in most else 0.1
        rows *= 10.0 if head in most else 0.1
    space = SearchSpace.from_dict(declared()).bind(model, tiny.RANK)
    order = channel_order(model, space, mode, [{"input_ids": tiny.tokens()}])
    assert order[FIRST].shape == (2, 4)
    assert order[FIRST][:, 0].tolist() == [2, 3]
    assert torch.equal(order[FIRST].sort(1).values, torch.arange(4).expand(2, 4))
    net = Supernet(model, SearchSpace.from_dict(declared()), tiny.ADAPTERS["lora"], order=order)
    kept = net.layer("model.layers.0.self_attn.o_proj")
    strongest = attention.o_proj.base.weight.norm(dim=0).unflatten(0, (2, 4, 4)).sum(2)
    assert torch.all(strongest[:, 0] > strongest[:, 1:].max())
    with net.active(net.space.minimal()):
        torch.testing.assert_close(
            kept.weight, torch.cat([kept.base.weight[:, :4], kept.base.weight[:, 16:20]], 1)
        )


def test_one_key_value_head_keeps_the_most_important_query_heads():
    base = tiny.llama(num_attention_heads=4, num_key_value_heads=1)
    space = SearchSpace.from_dict(declared())
    batches = [{"input_ids": tiny.tokens()}]
    order = channel_order(base, space.bind(base, tiny.RANK), "activation", batches)
    assert order[FIRST].shape == (1, 4)
    net = tiny.randomize_(Supernet(base, space, tiny.ADAPTERS["lora"], order=order))
    with net.active(net.space.minimal()):
        expected = tiny.logits(net.model, tiny.tokens())
    close(tiny.logits(compact(net, net.space.minimal()), tiny.tokens()), expected, 1e-12)


def test_uniform_ones_are_the_family_s_own_class(tmp_path):
    """Where the config may say so: Llama's wants the hidden size to be a multiple of the heads."""
    net = net_of(choices=[4, 3, 2])
    for choice, plain in ((2, True), (3, False)):
        sub = {g.name: choice if g.dim == "query_heads" else g.choices[0] for g in net.space}
        small = compact(net, net.space.check(type(net.space.minimal())(tuple(sub.items()))))
        folder = hf.write(small, None, tmp_path / str(choice))
        again = hf.load(folder, torch.float64)
        close(output(again), output(small), 1e-5)
        assert (not (folder / hf.CODE).exists()) is plain
        if plain:
            assert (again.config.num_attention_heads, again.config.num_key_value_heads) == (4, 2)


def test_every_runtime_computes_the_same(tmp_path):
    net = net_of(torch.float32)
    same_in_every_runtime(compact(net, net.space.minimal()), tmp_path)


def test_adapters_from_elsewhere_are_cut_the_same_way():
    net = net_of()
    shapes = {"q_proj": (32, 32), "o_proj": (32, 32)}
    deltas = {
        f"model.layers.1.self_attn.{name}.weight": torch.randn(shape, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    config = MergeConfig(adapters=[MergeAdapterConfig(path="theirs")])
    sub = net.space.minimal()
    found, _ = combine(net, sub, [Update("theirs", "peft lora", deltas)], config)
    moved = net.permutations()
    for name, delta in deltas.items():
        site = name.removesuffix(".weight")
        axis = "out" if "q_proj" in site else "in"
        delta = delta[moved[site, axis]] if axis == "out" else delta[:, moved[site, axis]]
        net.layer(site).base.weight.data += delta
    close(output(found), output(compact(net, sub)), 1e-10)


def test_their_importance_is_the_slope_of_the_loss():
    net, batch = net_of(ordered=False), batch_of("abc")
    layer = net.layer("model.layers.0.self_attn.o_proj")
    gone = torch.ones(32, dtype=torch.float64)
    gone[:4] = gone[16:20] = 0
    ends = []
    for by in (1 + STEP, 1 - STEP):
        hook = layer.register_forward_pre_hook(lambda _, x, by=by: (x[0] * (1 + (by - 1) * gone),))
        ends.append(loss(net, batch))
        hook.remove()
    slope = (ends[0] - ends[1]) / (2 * STEP)
    assert group_importance(net, [batch])[FIRST] == pytest.approx(abs(slope), rel=1e-3)


@pytest.mark.parametrize(
    "family, outputs, inputs, message",
    [
        ("gpt-neox", ["attention.query_key_value"], ["attention.dense"], "does not say how many"),
        ("phi3", ["self_attn.qkv_proj"], ["self_attn.o_proj"], "counts on all its heads"),
        ("llama", ["mlp.up_proj"], ["mlp.down_proj"], "is not in attention"),
        ("llama", ["self_attn.k_proj"], ["self_attn.o_proj"], "differ in size"),
    ],
)
def test_what_has_no_query_heads_of_its_own_is_refused(family, outputs, inputs, message):
    fused = {"phi3": {"fused": "parts"}, "gpt-neox": {"fused": "heads"}}.get(family, {})
    group = QUERIES | {"outputs": outputs, "inputs": inputs, "choices": [1.0]} | fused
    blocks = "gpt_neox.layers.*" if family == "gpt-neox" else "model.layers.*"
    value = {"blocks": blocks, "adapt": outputs, "groups": {"queries": group}}
    with pytest.raises(ConfigError, match=message):
        SearchSpace.from_dict(value).bind(model_of(family), tiny.RANK)
