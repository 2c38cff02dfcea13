"""Importances are what cutting a little of a group does to the loss, by finite differences."""

from __future__ import annotations

import pytest
import torch

from elastic.supernet.group_importance import group_importance
from tests.helpers import tiny
from tests.helpers.laws import STEP, batch_of, loss


def scale_what_would_be_gone(net, group, by: float) -> None:
    """Of one group, between the full size and the smallest choice."""
    for cut in group.cuts:
        kept = group.choices[-1] * cut.unit
        layer = net.layer(cut.site)
        if cut.axis == "in":
            layer.base.weight.data[:, kept:] *= by
            if layer.adapter is not None:
                layer.adapter.A.data[:, kept:] *= by
        elif cut.axis == "rank":
            layer.adapter.B.data[:, kept:] *= by


@pytest.mark.parametrize("dim", ["rank", "width", "heads"])
def test_it_is_the_slope_of_the_loss(dim):
    net, batch = tiny.supernet(heads=True), batch_of("abc")
    found = group_importance(net, [batch])
    for group in net.space:
        if group.dim != dim:
            continue
        ends = []
        for by in (1 + STEP, 1 - STEP):
            scale_what_would_be_gone(net, group, by)
            ends.append(loss(net, batch))
            scale_what_would_be_gone(net, group, 1 / by)
        slope = (ends[0] - ends[1]) / (2 * STEP)
        assert found[group.name] == pytest.approx(abs(slope), rel=1e-3)
        assert found[group.name] > 0


def test_examples_count_alike_whatever_stands_beside_them():
    prompts = ("abc", "a much longer one", "be", "cab")
    net = tiny.supernet()
    alone = [group_importance(net, [batch_of(prompt)]) for prompt in prompts]
    together = group_importance(net, [batch_of(*prompts[:3]), batch_of(prompts[3])])
    for name, value in together.items():
        mean = sum(one[name] ** 2 for one in alone) / len(alone)
        assert value == pytest.approx(mean**0.5, rel=1e-6)


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_every_method_has_a_share_of_it(method):
    net = tiny.supernet(method)
    before = net.factor_state()
    found = group_importance(net, [batch_of("abc", "cab")])
    assert list(found) == [group.name for group in net.space]
    assert all(value > 0 for value in found.values())
    after = net.factor_state()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in net.model.parameters())
    hooks = [
        hook
        for name, module in net.model.named_modules()
        for hook in (*module._forward_hooks, *module._forward_pre_hooks)
        if name != "lm_head"  # the supernet's own
    ]
    assert not hooks
