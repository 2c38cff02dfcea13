"""Factors in the matrices of all experts, beside fewer experts and narrower ones."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import elastic
from elastic.data.answers import answer_logits, answer_loss
from elastic.errors import ConfigError, ModelError
from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.compensation import Compensation
from elastic.supernet.few import alike
from elastic.supernet.group_importance import group_importance
from elastic.supernet.moments import second_moments
from elastic.supernet.store import load_super_adapter
from elastic.supernet.supernet import Supernet
from elastic.training.estimate import Batch
from elastic.training.fake_step import rehearse
from elastic.training.trainer import frozen
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
from tests.helpers.mixtures import adapted_net, factors_of, model_of, precision, space_of

LAID_OUT = ["mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3"]
"""Halves, halves beside dense widths, (in, out) with gate and up in turns and biases, groups."""


@pytest.mark.parametrize("family", LAID_OUT)
def test_active_sliced_and_merged_are_one_function(family):
    net = adapted_net(family)
    for sub in several(net, draws=2):
        one_function(net, sub, output, precision(family))


@pytest.mark.parametrize("family", LAID_OUT)
def test_what_is_cut_of_the_update_is_what_is_cut_of_the_weight(family):
    """As if the whole update had been in the base all along."""
    net = adapted_net(family)
    merged = compact(net, net.space.maximal())
    plain = Supernet(merged, space_of(family), tiny.ADAPTERS["lora"])
    for sub in several(net, draws=2):
        whole = {g.name: g.choices[0] for g in net.space if g.dim == "rank"}
        sub = SubAdapter(tuple((sub.as_dict() | whole).items()))
        cut = {g.name: sub[g.name] for g in plain.space}
        with torch.no_grad(), net.active(sub), plain.active(SubAdapter(tuple(cut.items()))):
            close(output(net.model), output(plain.model), precision(family))


def test_blocks_with_other_ranks_in_their_experts_are_not_alike():
    net = Supernet(
        model_of("mixtral", num_hidden_layers=8), factors_of("mixtral"), tiny.ADAPTERS["lora"]
    )
    assert [len(kind) for kind in alike(net.model)] == [8]
    one = {"model.layers.4.down_proj": 3}
    with net.active(SubAdapter(tuple((net.current.as_dict() | one).items()))):
        assert [len(kind) for kind in alike(net.model)] == [7]


@pytest.mark.parametrize("family", LAID_OUT)
def test_every_factor_learns(family):
    every_factor_learns(adapted_net(family, "rank"), output)


@pytest.mark.parametrize("family", LAID_OUT)
def test_saved_and_loaded_on_the_base_it_is_the_same(family, tmp_path):
    net = adapted_net(family)
    save(net, tmp_path / "saved")
    again = load_super_adapter(model_of(family), "sha256:mine", tmp_path / "saved")
    for sub in several(net, draws=1):
        with torch.no_grad(), net.active(sub) as one, again.active(sub) as other:
            close(output(other), output(one))


@pytest.mark.parametrize("family", LAID_OUT)
def test_streamed_from_the_base_it_is_bit_for_bit_the_same(family):
    base = model_of(family)
    net = Supernet(model_of(family), factors_of(family), tiny.ADAPTERS["lora"])
    order = tiny.permutations(net)
    net.reorder(order)
    tiny.randomize_(net)
    same(base, net, without_data(base, net, factors_of(family), "lora", order))


# What is known of them on calibration tokens


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_what_is_made_up_for_is_made_up_for_of_the_update_too(family):
    net = adapted_net(family)
    net.compensation = Compensation(second_moments(net, [{"input_ids": tiny.tokens(8, 16)}]))
    for sub in several(net, draws=1):
        one_function(net, sub, output, precision(family), degree=0.5)
    sub = net.space.minimal()
    with torch.no_grad():
        before = output(compact(net, sub, 0.5))
    mixture = next(iter(net.mixtures.values())).experts
    A = mixture.factors["down_proj"].adapter.A
    A.data[:, :, 8:] += 0.5  # of channels that are cut, and read by those that are left
    with torch.no_grad():
        assert (output(compact(net, sub, 0.5)) - before).abs().max() > 1e-3
        one_function(net, sub, output, precision(family), degree=0.5)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_moments_are_those_of_the_experts_with_their_update(family):
    net = adapted_net(family, "expert_width")
    batch = [{"input_ids": tiny.tokens(4, 9)}]
    merged = Supernet(
        compact(net, net.space.maximal()), space_of(family, "expert_width"), tiny.ADAPTERS["lora"]
    )
    expected = second_moments(merged, batch)
    found = second_moments(net, batch)
    assert set(found) == set(expected)
    for name, moment in expected.items():
        close(found[name], moment, 1e-4)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj", "expert_width", "experts"])
def test_the_importance_of_a_group_is_the_slope_of_the_loss(name):
    """Along what experts with their update would add less."""
    net, batch = adapted_net("gpt-oss"), batch_of("abc")
    found = group_importance(net, [batch])
    for layer in range(2):
        group = next(g for g in net.space if g.name == f"model.layers.{layer}.{name}")
        experts = net.model.model.layers[layer].mlp.experts
        slope = slope_of(net, batch, experts, partial(lost, experts, group))
        assert found[group.name] == pytest.approx(abs(slope), rel=1e-2)  # norms round to float32
        assert found[group.name] > 0


def lost(experts, group, hidden, chosen, weights):
    """What experts add, less what they add at the smallest choice of a group."""
    least, full = group.choices[-1], experts.forward(hidden, chosen, weights)
    if group.dim == "experts":
        return experts.forward(hidden, chosen, weights * (chosen >= least))
    size, what = experts.size, "channels"
    if group.dim == "rank":
        size, what = experts.factors[group.name.rpartition(".")[2]].size, "rank"
    before = getattr(size, what)
    setattr(size, what, least)
    small = experts.forward(hidden, chosen, weights)
    setattr(size, what, before)
    return full - small


def slope_of(net, batch, module, direction) -> float:
    """Of the loss, were so much of it added to what a module answers."""
    ends = []
    for by in (STEP, -STEP):
        handle = module.register_forward_hook(
            lambda _, given, out, by=by: out + by * direction(*given)
        )
        ends.append(loss(net, batch))
        handle.remove()
    return (ends[0] - ends[1]) / (2 * STEP)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_a_step_without_data_has_the_operations_of_a_real_one(family):
    batch = Batch(sequences=2, length=8, answer=3)
    net = adapted_net(family, dtype=torch.float32)
    net.model.set_experts_implementation("batched_mm")
    for sub in (net.space.maximal(), net.space.minimal()):
        with Flops() as flops, net.active(sub):
            answer_loss(*answer_logits(net.model, batch.tensors(net.model), 3)).backward()
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert rehearse(net, sub, batch).flops == flops.get_total_flops()


# What is refused


@pytest.mark.parametrize("method", ["sorsa", "prolora", "olora", "soslora"])
def test_other_methods_have_no_factors_for_experts(method):
    with torch.device("meta"):
        model = model_of("mixtral")
    with pytest.raises(ConfigError, match=f"{method} has no factors for matrices of all experts"):
        Supernet(model, factors_of("mixtral"), tiny.ADAPTERS[method], start=False)


def test_dropout_is_refused():
    adapter = replace(tiny.ADAPTERS["lora"], dropout=0.1)
    with pytest.raises(ConfigError, match=r"adapter.dropout 0.1 .* give --adapter.dropout 0"):
        Supernet(model_of("mixtral"), factors_of("mixtral"), adapter)


def test_what_is_no_matrix_of_all_experts_is_refused():
    for name in ("mlp.experts.down_proj_bias", "mlp.experts.up", "mlp.experts"):
        space = {"blocks": "model.layers.*", "adapt": [name, "mlp.experts.down_proj"],
                 "groups": {"r": {"dim": "rank", "of": [name], "choices": [4]}}}  # fmt: skip
        with pytest.raises(
            ConfigError, match=f"'model.layers.0.{name}' matches no linear layer or"
        ):
            SearchSpace.from_dict(space).bind(model_of("gpt-oss"), 4)


def test_a_teacher_keeps_the_factors_that_it_was_made_with():
    net = adapted_net("mixtral")
    teacher = frozen(net)
    with torch.no_grad():
        before = output(net.model)
        for _, adapter in net.adapters():
            adapter.B.mul_(2)
        close(output(teacher), before)
        assert (output(net.model) - before).abs().max() > 1e-2


def test_a_model_whose_experts_alone_carry_factors_carries_a_super_adapter():
    space = {"blocks": "model.layers.*", "adapt": ["mlp.experts.down_proj"],
             "groups": {"r": {"dim": "rank", "of": ["mlp.experts.down_proj"],
                              "choices": [1.0, 0.5]}}}  # fmt: skip
    net = elastic.attach(model_of("mixtral"), space=space, max_rank=4, ranks="elastic")
    tiny.randomize_(net.supernet)
    for name in ("maximal", "minimal"):
        one_function(net.supernet, net.space.named(name), output, precision("mixtral"))
    with pytest.raises(ModelError, match="carries a super-adapter already"):
        elastic.attach(net.model, space=space, max_rank=4)
