"""Mixtures of experts, with fewer experts and narrower ones: the laws of every dimension."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from elastic.config import CompensationConfig, ModelConfig
from elastic.data.answers import answer_logits, answer_loss
from elastic.errors import ConfigError, RunError
from elastic.models.modules import plain_linear
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.compensation import Compensation
from elastic.supernet.cost import Counter
from elastic.supernet.discovery import discover
from elastic.supernet.fitted_experts import Seen, fit_experts_
from elastic.supernet.group_importance import group_importance
from elastic.supernet.held_out import HeldOut
from elastic.supernet.importance import channel_order
from elastic.supernet.moments import second_moments
from elastic.supernet.routed import channels, widths_of
from elastic.supernet.sequential import fit_, fit_streamed_
from elastic.supernet.store import load_super_adapter, save_super_adapter
from elastic.supernet.streaming import streamed
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
    ROUNDED,
    WIDTH,
    model_of,
    net_of,
    space_of,
)


def precision(family: str) -> float:
    return 1e-5 if family in ROUNDED else 1e-9


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


def experts_by_hand(model, hidden, layer=0):
    """(token, expert): weight by the router, and what its channels hold, of a Mixtral."""
    block = model.model.layers[layer].mlp
    weights = (hidden @ block.gate.weight.T).float().softmax(-1)
    weights, chosen = weights.topk(2)
    weights = (weights / weights.sum(-1, keepdim=True)).double()
    for token, (row, some) in enumerate(zip(weights, chosen, strict=True)):
        for weight, expert in zip(row, some, strict=True):
            gate, up = (block.experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
            yield weight, int(expert), torch.nn.functional.silu(gate) * up


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


def down_of(experts):
    """(experts, channels, hidden)."""
    return experts.down_proj if experts.is_transposed else experts.down_proj.transpose(1, 2)


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


def solved_by_hand(net, name: str, place: int, kept: int, degree: float, moment):
    """What reads the first channels of an expert, (kept, hidden), with so much made up for."""
    down = down_of(net.mixtures[name].experts.base)[place]
    ridge = 0.01 * moment.diagonal().mean()
    among = moment[:kept, :kept] + ridge * torch.eye(kept)
    return down[:kept] + degree * torch.linalg.solve(among, moment[:kept, kept:]) @ down[kept:]


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "deepseek-v3"])
def test_what_is_made_up_for_is_one_function_and_as_the_formula_has_it(family, tmp_path):
    net = net_of(family)
    moments = second_moments(net, [{"input_ids": tiny.tokens(8, 16)}])
    assert len(moments) >= 0.8 * len(widths_of(net.space))  # some get no token
    assert set(moments) <= set(widths_of(net.space))
    net.compensation = Compensation(moments)
    for sub in several(net, draws=1):
        one_function(net, sub, output, precision(family), degree=0.5)
    sub = net.space.minimal()
    name, (mixture, _) = next(iter(net.space.mixtures.items()))
    small, kept = compact(net, sub, 0.5), 8
    experts = small.get_submodule(name)
    starts = [group * mixture.count for group in range(mixture.groups)]
    places = [start + n for start in starts for n in range(3)]
    for at, place in enumerate(places):
        if f"{name}.{place}" not in moments:
            continue
        moment = moments[f"{name}.{place}"].double()
        close(down_of(experts)[at], solved_by_hand(net, name, place, kept, 0.5, moment), 1e-5)
    assert (output(compact(net, sub)) - output(small)).abs().max() > 1e-3
    save_super_adapter(net, tmp_path / "saved", model=ModelConfig(path="tiny"), base_digest="x",
                       moments=moments)  # fmt: skip
    again = load_super_adapter(model_of(family), "x", tmp_path / "saved")
    close(output(compact(again, sub, 0.5)), output(small), 1e-2)  # saved in half precision


def test_moments_are_those_of_the_tokens_that_an_expert_gets():
    net = net_of("mixtral", "expert_width")
    ids, inputs = tiny.tokens(), []
    name = "model.layers.0.mlp.experts"
    handle = net.model.model.layers[0].mlp.register_forward_pre_hook(
        lambda _, given: inputs.append(given[0].flatten(0, 1))
    )
    moments = second_moments(net, [{"input_ids": ids}])
    handle.remove()
    model = compact(net, net.space.maximal())
    held: dict[int, list] = {}
    for weight, expert, x in experts_by_hand(model, inputs[0]):
        held.setdefault(expert, []).append(weight * x)
    for expert, rows in held.items():
        x = torch.stack(rows)
        close(moments[f"{name}.{expert}"].double(), x.T @ x / len(x), 1e-5)


def test_made_up_for_fewer_channels_say_nearly_what_all_do():
    """Where the channels that go follow those that stay, nothing is lost."""
    net = net_of("gpt-oss", "expert_width")
    for mixture in net.mixtures.values():
        base, kept = mixture.experts.base, 16
        for tensor in (base.gate_up_proj, base.gate_up_proj_bias):  # gate and up take turns
            tensor.data[..., 2 * kept :] = tensor.data[..., : 2 * (WIDTH - kept)]
    moments = second_moments(net, [{"input_ids": tiny.tokens(8, 16)}])
    net.compensation = Compensation(moments, ridge=1e-6)
    sub = net.space.heuristic()
    ends = []
    with torch.no_grad():
        full = output(net.model)
        for degree in (0.0, 1.0):
            with net.active(sub, degree):
                ends.append(float((output(net.model) - full).norm() / full.norm()))
    assert ends[1] < 0.05 < 0.2 < ends[0]  # of few tokens, and with a ridge


def test_streamed_with_what_is_made_up_for_it_is_the_same():
    base = model_of("mixtral")
    net = Supernet(model_of("mixtral"), space_of("mixtral"), tiny.ADAPTERS["lora"])
    order = tiny.permutations(net)
    net.reorder(order)
    bare = without_data(base, tiny.randomize_(net), space_of("mixtral"), "lora", order)
    moments = second_moments(net, [{"input_ids": tiny.tokens(8, 16)}])
    net.compensation = bare.compensation = Compensation(moments)
    same(base, net, bare, degree=0.5)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_a_linear_error_of_experts_is_learnt(family):
    experts = compact(net_of(family), net_of(family).space.minimal()).model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    wanted = 0.3 * torch.randn(down_of(experts).shape, generator=generator).double()

    def seen() -> Seen:
        hidden = torch.randn(600, HIDDEN, generator=generator).double()
        chosen = torch.rand(600, 3, generator=generator).argsort(1)[:, :2]
        weights = torch.rand(600, 2, generator=generator).double()
        missing = sum(
            torch.einsum("tc,tch->th", held, wanted[sent])
            for sent, held in channels(experts, hidden, chosen, weights)
        )
        return Seen((hidden, chosen, weights), missing.float())

    fitted, held_out, fresh = seen(), seen(), seen()
    before = experts(*fresh.given)
    assert fit_experts_(experts, [fitted], [held_out])
    left = before + fresh.missing - experts(*fresh.given)
    assert left.norm() < 0.2 * fresh.missing.norm()


def test_what_dropped_experts_gave_is_learnt_by_those_that_are_left():
    net = net_of("mixtral", "experts")
    draws = random.Random(3)

    def batch(count: int) -> dict[str, torch.Tensor]:
        return batch_of(*("".join(draws.choices(tiny.CHARACTERS, k=24)) for _ in range(count)))

    sub, batches = net.space.minimal(), [batch(24) for _ in range(4)]
    assert net.drops_experts(sub) and not net.cuts(sub)
    small, fresh = compact(net, sub), batch(16)["input_ids"]
    with torch.no_grad():
        full = net.model(input_ids=fresh).logits
        before = (small(input_ids=fresh).logits - full).norm()
        shared = compact(net, sub).state_dict()
        assert fit_(small, net, sub, batches) == 2
        after = (small(input_ids=fresh).logits - full).norm()
        assert after < 0.97 * before  # random experts know little of one another
        net.compensation = None
        held_out = HeldOut(net, CompensationConfig(), [batch(8)])
        held_out.examples = lambda: batches
        made_up, model = held_out.refined(sub, held_out(sub))
        assert made_up.sequential and made_up.degree == 0.0
        close(model(input_ids=fresh).logits, small(input_ids=fresh).logits)
    for name, tensor in compact(net, sub).state_dict().items():
        assert torch.equal(tensor, shared[name]), name  # nothing of the supernet has changed


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


def test_a_mixture_that_is_not_in_memory_is_fitted_all_the_same(tmp_path):
    base, space = model_of("mixtral", torch.float32), space_of("mixtral")
    net = Supernet(copy.deepcopy(base), space, tiny.ADAPTERS["lora"])
    order = tiny.permutations(net)
    net.reorder(order)
    bare = without_data(base, tiny.randomize_(net), space, "lora", order)
    draws, sub = random.Random(3), net.space.minimal()
    batches = [batch_of(*("".join(draws.choices(tiny.CHARACTERS, k=20)) for _ in range(16)))
               for _ in range(4)]  # fmt: skip
    small = compact(net, sub)
    assert fit_(small, net, sub, batches) >= 1
    whole, found = streamed(base, bare, net.space.maximal()), streamed(base, bare, sub)
    assert fit_streamed_(found, whole, bare, sub, batches, tmp_path) >= 1
    changed = {file.name for file in tmp_path.iterdir()}
    assert any("down_proj" in name for name in changed)
    for name, tensor in small.state_dict().items():
        close(found.tensors[name](), tensor, 1e-4)


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
