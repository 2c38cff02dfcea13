"""What is cut is made up for: the closed form, and one function wherever it is computed."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.supernet import moments
from elastic.supernet.compact import compact
from elastic.supernet.compensation import Compensation, footprint, solution
from elastic.supernet.moments import Moments, second_moments
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import FAMILIES, ROUNDED, model_of, output
from tests.helpers.laws import (
    MERGED,
    batch_of,
    one_function,
    pair,
    same,
    several,
    some_moments,
)


def supernet(family: str, method: str = "lora") -> Supernet:
    space = SearchSpace.load(FAMILIES[family][1])
    net = Supernet(model_of(family), space, tiny.ADAPTERS[method])
    net.reorder(tiny.permutations(net))
    tiny.randomize_(net)
    net.compensation = some_moments(net)
    return net


# The closed form


@given(st.integers(2, 12), st.data())
def test_the_solution_is_the_ridge_regression(n, data):
    left = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1))
    x = torch.randn(n + 3, n, generator=torch.Generator().manual_seed(n))
    moment = x.T @ x
    kept = sorted(left)
    cut = [i for i in range(n) if i not in left]
    found = solution(moment, tuple((i, 1) for i in kept), 0.1).double()
    damped = moment[kept][:, kept].double() + 0.1 * moment.diagonal().mean() * torch.eye(len(kept))
    torch.testing.assert_close(found @ damped, moment[cut][:, kept].double(), rtol=1e-4, atol=1e-4)


def test_channels_that_never_spoke_are_not_made_up_for():
    assert not solution(torch.zeros(4, 4), ((0, 2),), 0.01).any()


def test_solutions_are_forgotten_where_there_is_no_room_and_solved_again():
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    known = {"a": x.T @ x, "b": x.T @ x + 1}
    roomy, narrow = Compensation(known), Compensation(known, room=1)
    for site in ("a", "b", "a"):
        assert torch.equal(roomy(site, ((0, 5),)), narrow(site, ((0, 5),)))
    assert roomy("a", ((0, 5),)) is roomy("a", ((0, 5),))
    assert len(narrow._solved) == 1


def test_what_repeats_others_can_be_cut_without_loss():
    net = supernet("llama")
    with torch.no_grad():
        for site in net.space.reading:
            half = net.layer(site).base.in_features // 2
            for name in ("gate_proj", "up_proj"):
                layer = net.layer(f"{site.rpartition('.')[0]}.{name}")
                layer.base.weight[half:] = layer.base.weight[:half]
                layer.adapter.B[half:] = layer.adapter.B[:half]
    whole, least = net.space.maximal().as_dict(), net.space.minimal().as_dict()
    narrow = SubAdapter(
        tuple((name, (least if "width" in name else whole)[name]) for name in whole)
    )
    examples = [tiny.tokens(batch=8, length=12, seed=seed) for seed in range(4)]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in examples]
    net.compensation = Compensation(second_moments(net, batches), ridge=1e-6)

    def said(sub, degree):
        with torch.no_grad(), net.active(sub, degree):
            return output(net.model)

    expected = said(net.space.maximal(), 0.0)
    found, lost = said(narrow, 1.0), said(narrow, 0.0)
    assert (found - expected).norm() < 1e-2 * (lost - expected).norm()


# One function


@pytest.mark.parametrize("family", FAMILIES)
def test_active_sliced_and_merged_compute_the_same(family):
    net = supernet(family)
    precision = 1e-4 if family in ROUNDED else MERGED
    for sub in several(net, draws=1):
        found, _ = one_function(net, sub, output, precision, degree=0.5)
        with net.active(sub):
            plain = output(net.model)
        narrow = any(g.dim != "rank" and sub[g.name] < g.choices[0] for g in net.space)
        assert torch.equal(found, plain) != narrow


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_every_method(method):
    net = supernet("llama", method)
    for sub in several(net, draws=1):
        one_function(net, sub, output, MERGED, degree=1.0)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "t5"])
def test_streamed_it_is_the_same_to_the_bit(family):
    base, net, bare = pair(family)
    net.compensation = bare.compensation = some_moments(net)
    same(base, net, bare, degree=0.5)


def test_half_the_degree_is_half_the_change():
    net = supernet("llama")
    sub = net.space.minimal()
    weights = [compact(net, sub, degree).state_dict() for degree in (0.0, 0.5, 1.0)]
    for none, half, whole in zip(*(each.values() for each in weights), strict=True):
        torch.testing.assert_close(half, (none + whole) / 2)


def test_leaving_restores_what_was_made_up_for():
    net = supernet("llama")
    small, smaller = net.space.heuristic(), net.space.minimal()
    with torch.no_grad(), net.active(small, 0.5):
        expected = output(net.model)
        with net.active(smaller, 1.0):
            assert not torch.equal(output(net.model), expected)
        assert torch.equal(output(net.model), expected)
    assert net.degree == 0


def test_the_full_size_is_untouched():
    net = supernet("llama")
    with torch.no_grad(), net.active(net.space.maximal()):
        expected = output(net.model)
    with torch.no_grad(), net.active(net.space.maximal(), 1.0):
        assert torch.equal(output(net.model), expected)


# Moments


def test_padding_is_not_counted():
    net = supernet("llama")
    together = second_moments(net, [batch_of("a b c", "d e f g h i j k")])
    apart = second_moments(net, [batch_of("a b c"), batch_of("d e f g h i j k")])
    assert set(together) == set(net.space.reading)
    for site, moment in together.items():
        torch.testing.assert_close(moment, apart[site])


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "t5"])
def test_what_it_takes_is_known_beforehand(family, tmp_path):
    net = supernet(family)
    columns = {site: net.layer(site).base.in_features for site in net.space.reading}
    found = footprint(net.space, columns, room=1e12)
    known = some_moments(net).moments
    moments.save(known, tmp_path / "moments.safetensors")
    held = sum(read.nbytes for read in load_file(tmp_path / "moments.safetensors").values())
    assert found.saved == held
    assert found.calibration == sum(moment.nbytes for moment in known.values())
    solved = set()
    for indices in itertools.product(
        *(range(len(g.choices)) for g in net.space if g.dim != "rank")
    ):
        named = dict(zip((g.name for g in net.space if g.dim != "rank"), indices, strict=True))
        sub = net.space.at({g.name: named.get(g.name, 0) for g in net.space})
        for site in net.space.reading:
            if (left := net.space.left(sub, site, "in")) != ((0, columns[site]),):
                solved.add((site, left))
    assert found.solutions == sum(net.compensation(*each).nbytes for each in solved)


def test_in_as_many_passes_as_there_is_room_for():
    net = supernet("llama")
    batches = [batch_of("a b c")]
    once, often = second_moments(net, batches), second_moments(net, batches, room=1)
    assert once.keys() == often.keys()
    assert all(torch.equal(once[site], often[site]) for site in once)


def test_saved_they_are_nearly_the_same_and_the_same_every_time(tmp_path):
    net = supernet("llama")
    known = second_moments(net, [batch_of("a b c", "d e f g h")])
    moments.save(known, tmp_path / "moments.safetensors")
    read, again = (Moments(tmp_path / "moments.safetensors") for _ in range(2))
    assert set(read) == set(known)
    for site, moment in known.items():
        scale = moment.diagonal().sqrt()
        assert ((read[site] - moment).abs() <= 1e-3 * scale * scale[:, None] + 1e-12).all()
        assert torch.equal(read[site], again[site])
        assert torch.equal(read[site], read[site].T)


def test_what_is_not_finite_is_left_out_and_said(capsys):
    net = supernet("llama")
    site = net.space.reading[0]
    with torch.no_grad():
        net.layer(site).base.weight.fill_(torch.inf)
    found = second_moments(net, [batch_of("a b c")])
    assert len(found) < len(net.space.reading)
    assert "not finite" in " ".join(capsys.readouterr().err.split())
