"""Mixtures of experts, with fewer experts and narrower ones: the laws of every dimension."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from elastic.data.answers import answer_logits, answer_loss
from elastic.errors import ConfigError, RunError
from elastic.models.modules import plain_linear
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.cost import Counter
from elastic.supernet.discovery import discover
from elastic.supernet.group_importance import group_importance
from elastic.supernet.importance import channel_order
from elastic.supernet.routed import channels
from elastic.supernet.store import load_super_adapter
from elastic.supernet.supernet import Supernet
from elastic.training.estimate import Batch
from elastic.training.fake_step import rehearse
from tests.helpers import tiny
from tests.helpers.families import output
from tests.helpers.flops import Flops
from tests.helpers.laws import (
    STEP,
    batch_of,
    close,
    every_factor_learns,
    loss,
    one_function,
    same,
    save,
    several,
    without_data,
)
from tests.helpers.mixtures import (
    COUNT,
    FAMILIES,
    HIDDEN,
    WIDTH,
    down_of,
    experts_by_hand,
    model_of,
    net_of,
    precision,
    space_of,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_active_sliced_and_merged_are_one_function(family):
    net = net_of(family)
    with torch.no_grad():
        full = output(net.model)
        for sub in several(net, draws=1):
            expected, _ = one_function(net, sub, output, precision(family))
            if sub != net.space.maximal():
                assert (expected - full).abs().max() > 1e-3 * full.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_experts_and_channels_leaves_the_base_model_as_it_is(family):
    expected = output(model_of(family))
    net = Supernet(model_of(family), space_of(family), tiny.ADAPTERS["lora"])
    before = {name: tensor.clone() for name, tensor in net.model.named_parameters()}
    net.reorder(tiny.permutations(net))
    close(output(net.model), expected, 1e-5)  # a sum in another order, in float32
    moved = {name for name, tensor in net.model.named_parameters()
             if not torch.equal(tensor, before[name])}  # fmt: skip
    assert sum("experts" in name for name in moved) >= 4
    assert sum("gate." in name or "router." in name for name in moved) >= 2


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "deepseek-v3"])
def test_streamed_from_the_base_it_is_bit_for_bit_the_same(family):
    base = model_of(family)
    net = Supernet(model_of(family), space_of(family), tiny.ADAPTERS["lora"])
    order = tiny.permutations(net)
    net.reorder(order)
    tiny.randomize_(net)
    bare = without_data(base, net, space_of(family), "lora", order)
    same(base, net, bare)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "deepseek-v3"])
def test_saved_and_loaded_on_the_base_it_is_the_same(family, tmp_path):
    net = net_of(family)
    save(net, tmp_path / "saved")
    again = load_super_adapter(model_of(family), "sha256:mine", tmp_path / "saved")
    for sub in several(net, draws=1):
        with torch.no_grad(), net.active(sub) as one, again.active(sub) as other:
            close(output(other), output(one))


def test_an_order_of_another_shape_is_refused(tmp_path):
    net = net_of("mixtral")
    save(net, tmp_path / "saved")
    file = tmp_path / "saved" / "order.safetensors"
    order = load_file(file)
    name = next(name for name in order if name.endswith("expert_width"))
    save_file(order | {name: order[name][:1].contiguous()}, file)
    with pytest.raises(RunError, match="no permutation"):
        load_super_adapter(model_of("mixtral"), "sha256:mine", tmp_path / "saved")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_gets_a_gradient_and_experts_get_none(family):
    net = net_of(family)
    every_factor_learns(net, output)
    trained = {name for name, tensor in net.model.named_parameters() if tensor.grad is not None}
    assert all(".adapter." in name for name in trained)


def test_experts_and_channels_come_by_what_they_add_to_real_tokens():
    model = model_of("mixtral")
    space = space_of("mixtral").bind(model, tiny.RANK)
    ids = tiny.tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(
        lambda _, given: inputs.append(given[0].flatten(0, 1)[mask.flatten().bool()])
    )
    order = channel_order(model, space, "activation", [{"input_ids": ids, "attention_mask": mask}])
    handle.remove()
    down = model.model.layers[0].mlp.experts.down_proj
    added, squares = torch.zeros(COUNT), torch.zeros(COUNT, WIDTH)
    for weight, expert, held in experts_by_hand(model, inputs[0]):
        added[expert] += weight * (down[expert] @ held).norm()
        squares[expert] += (weight * held) ** 2 * down[expert].square().sum(0)
    assert added.argsort(descending=True).tolist() == order["model.layers.0.experts"].tolist()
    found, expected = order["model.layers.0.expert_width"], squares.argsort(-1, descending=True)
    seen = squares.sum(1) > 0
    assert seen.sum() > 2 and torch.equal(found[seen], expected[seen])


@pytest.mark.parametrize("family", ["gpt-oss", "deepseek-v3"])
def test_what_channels_hold_is_read_in_any_layout(family):
    """Where an expert's columns are zero but for one channel, what it adds is that channel's."""
    model = model_of(family)
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(5, HIDDEN, dtype=torch.float64)
    chosen = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0]])
    weights = torch.rand(5, 2, dtype=torch.float64)
    if experts.has_bias:
        experts.down_proj_bias.data.zero_()
    total = sum(
        torch.einsum("tc,tch->th", held, down_of(experts)[sent])
        for sent, held in channels(experts, hidden, chosen, weights)
    )
    close(total, experts(hidden, chosen, weights), 1e-10)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_by_norm_an_expert_or_channel_of_zeros_comes_last(family):
    model = model_of(family)
    experts = model.model.layers[1].mlp.experts
    for name, tensor in experts.named_parameters():
        tensor.data[2] = 0
        if name.startswith("gate_up"):
            axis = 2 if name == "gate_up_proj" and experts.is_transposed else 1
            last = tensor.data.movedim(axis, 0)
            last[[10, 11] if not experts.is_concatenated else [5, WIDTH + 5], 0] = 0
    space = space_of(family).bind(model, tiny.RANK)
    order = channel_order(model, space, "norm")
    assert order["model.layers.1.experts"][-1] == 2
    assert order["model.layers.1.expert_width"][0, -1] == 5


@pytest.mark.parametrize("dim", ["experts", "expert_width"])
def test_the_importance_of_a_group_is_the_slope_of_the_loss(dim):
    net, batch = net_of("gpt-oss"), batch_of("abc")
    found = group_importance(net, [batch])
    for layer in range(2):
        group = next(g for g in net.space if g.name == f"model.layers.{layer}.{dim}")
        experts, ends = net.mixtures[group.mixtures[0].experts].experts.base, []
        tensors = {"experts": (experts.down_proj, experts.down_proj_bias)}
        tensors["expert_width"] = (experts.down_proj.transpose(0, 1),)  # channels in front
        for by in (1 + STEP, 1 - STEP):
            for tensor in tensors[dim]:
                tensor.data[group.choices[-1] :] *= by
            ends.append(loss(net, batch))
            for tensor in tensors[dim]:
                tensor.data[group.choices[-1] :] /= by
        slope = (ends[0] - ends[1]) / (2 * STEP)
        assert found[group.name] == pytest.approx(abs(slope), rel=1e-2)  # norms round to float32
        assert found[group.name] > 0


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_a_step_without_data_has_the_operations_of_a_real_one(family):
    """Of the real one that gathers a matrix for every token: as many products."""
    batch = Batch(sequences=2, length=8, answer=3)
    net = net_of(family, dtype=torch.float32)
    net.model.set_experts_implementation("batched_mm")
    for sub in (net.space.maximal(), net.space.minimal()):
        with Flops() as flops, net.active(sub):
            answer_loss(*answer_logits(net.model, batch.tensors(net.model), 3)).backward()
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert rehearse(net, sub, batch).flops == flops.get_total_flops()


def test_what_cannot_be_cut_is_refused_in_words():
    def bound(
        choices,
        dim="experts",
        of="mlp.experts",
        family="mixtral",
        adapt=("self_attn.o_proj",),
        **more,
    ):
        groups = {"some": {"dim": dim, "of": [of], "choices": choices, **more}}
        space = {"blocks": "model.layers.*", "adapt": list(adapt), "groups": groups}
        return SearchSpace.from_dict(space).bind(model_of(family), 4)

    with pytest.raises(ConfigError, match="sent to some of at least 2; choose from 2"):
        bound([6, 1])
    with pytest.raises(ConfigError, match="choose from 2"):  # of each of two groups
        bound([1], family="deepseek-v3")
    with pytest.raises(ConfigError, match="multiple of 8"):
        bound([1.0], dim="expert_width", align=4)
    with pytest.raises(ConfigError, match="12 is not divisible by align 8"):
        bound([12], dim="expert_width")
    with pytest.raises(ConfigError, match="is no module of the model"):
        bound([1.0], of="mlp.expert")
    with pytest.raises(ConfigError, match="does not hold the weights of its experts"):
        bound([1.0], of="mlp")
    assert [group.choices for group in bound([1.0, 0.1])] == [(6, 2)] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_space_auto_finds_them(family):
    model = model_of(family, torch.float32)
    space = discover(model)
    dims = [group.dim for group in space.bind(model, 4)]
    assert dims.count("experts") == dims.count("expert_width") == 2
    again = SearchSpace.from_dict(space.as_dict())
    assert again.sections == space.sections


def test_a_router_is_not_adapted():
    router = FAMILIES["granite-moe"][1].replace("experts", "router")
    model = model_of("granite-moe", torch.float32)
    layer = plain_linear(model.model.layers[0].block_sparse_moe.router.weight, None)
    model.model.layers[0].block_sparse_moe.router.inner = layer
    model.model.layers[0].block_sparse_moe.router.weight = None
    groups = {"some": {"dim": "experts", "of": [FAMILIES["granite-moe"][1]], "choices": [4]}}
    space = {"blocks": "model.layers.0", "adapt": [f"{router}.inner"], "groups": groups}
    with pytest.raises(ConfigError, match=r"chooses among the experts .* leave it out of adapt"):
        SearchSpace.from_dict(space).bind(model, 4)


@pytest.mark.parametrize("share", ["block", "model"])
def test_beside_depth_or_shared_by_all_blocks_they_are_one_function(share):
    space = space_of("gpt-oss").as_dict()
    groups = {name: {**group, "share": share} for name, group in space["groups"].items()}
    if share == "block":
        groups["depth"] = {"dim": "depth", "choices": [4, 3, 2]}
    declared = SearchSpace.from_dict({**space, "groups": groups})
    model = model_of("gpt-oss", num_hidden_layers=4, layer_types=["full_attention"] * 4)
    base = copy.deepcopy(model)
    net = Supernet(model, declared, tiny.ADAPTERS["lora"])
    order = tiny.permutations(net) | ({"model.layers.*.depth": torch.tensor([0, 3, 2, 1])}
                                 if share == "block" else {})  # fmt: skip
    net.reorder(order)
    tiny.randomize_(net)
    for sub in several(net, draws=2):
        one_function(net, sub, output, precision("gpt-oss"))
    assert len(net.space.groups) == (13 if share == "block" else 3)
    assert net.space.minimal().as_dict().get("model.layers.1.experts", 0) == 0
    same(base, net, without_data(base, net, declared, "lora", order))


def test_a_loss_that_balances_experts_is_off():
    model = model_of("mixtral", output_router_logits=True)
    assert model.config.output_router_logits
    net = Supernet(model, space_of("mixtral"), tiny.ADAPTERS["lora"])
    with net.active(net.space.minimal()):
        output(net.model)
    assert not compact(net, net.space.minimal()).config.output_router_logits


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "deepseek-v3"])
def test_operations_and_active_parameters_are_those_of_the_experts_a_token_is_sent_to(family):
    """By hand: three products with each of two experts, and one with the router, in two layers."""
    net = net_of(family)
    small = compact(net, net.space.minimal())
    counted = Counter(net.model, net.space)(net.space.minimal())
    experts, groups = 3, 2 if family == "deepseek-v3" else 1
    one = 3 * HIDDEN * 8 + (2 * 8 + HIDDEN) * (family == "gpt-oss")  # with biases
    linear = sum(x.weight.numel() for x in small.modules() if isinstance(x, torch.nn.Linear))
    assert counted.params == sum(parameter.numel() for parameter in small.parameters())
    assert counted.macs == linear + 2 * (2 * 3 * HIDDEN * 8 + groups * experts * HIDDEN)
    assert counted.params - counted.active_params == 2 * (groups * experts - 2) * one
