"""What is made up for in mixtures of experts: channels by moments, experts by a fit."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from elastic.config import CompensationConfig, ModelConfig
from elastic.supernet.compact import compact
from elastic.supernet.compensation import Compensation
from elastic.supernet.fitted_experts import Seen, fit_experts_
from elastic.supernet.held_out import HeldOut
from elastic.supernet.moments import second_moments
from elastic.supernet.routed import channels, widths_of
from elastic.supernet.sequential import fit_, fit_streamed_
from elastic.supernet.store import load_super_adapter, save_super_adapter
from elastic.supernet.streaming import streamed
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import output
from tests.helpers.laws import (
    batch_of,
    close,
    one_function,
    same,
    several,
    without_data,
)
from tests.helpers.mixtures import (
    HIDDEN,
    WIDTH,
    down_of,
    experts_by_hand,
    model_of,
    net_of,
    precision,
    space_of,
)


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
