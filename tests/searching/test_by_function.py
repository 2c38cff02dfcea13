"""A search whose accuracy and latency are functions finds what trying everything finds."""

import contextlib
import math
from itertools import product

import optuna
import pytest
import torch

from elastic.config import TimingConfig
from elastic.errors import BudgetError, ConfigError, RunError
from elastic.latency import latency_table
from elastic.searching.by_function import search
from elastic.searching.sampler import AdditiveSampler
from elastic.spaces.candidates import CandidateSpace
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.cost import count
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny


@pytest.fixture(scope="module")
def net():
    """64 sub-adapters: four widths and two numbers of heads in each of two layers."""
    space = tiny.space(heads=True).with_whole_ranks()
    return Supernet(tiny.llama(dtype=torch.float32), space, tiny.ADAPTERS["lora"])


@pytest.fixture(scope="module")
def small():
    """16 sub-adapters, of widths alone."""
    space = tiny.space().with_whole_ranks()
    return Supernet(tiny.llama(dtype=torch.float32), space, tiny.ADAPTERS["lora"])


def widths(model) -> list[int]:
    return [layer.mlp.down_proj.in_features for layer in model.model.layers]


def score(model) -> float:
    """Additive: the first layer's width matters five times as much as the second's."""
    first, second = widths(model)
    heads = sum(layer.self_attn.o_proj.in_features for layer in model.model.layers)
    return (5 * first + second + heads / 8) / 500


def size(model) -> float:
    return float(
        sum(widths(model)) + sum(l.self_attn.o_proj.in_features for l in model.model.layers)
    )


def half(sub) -> float:
    return 0.0


def everything(net):
    """(accuracy, latency) of all sub-adapters, by the functions."""
    found = {}
    for at in product(*(range(len(group.choices)) for group in net.space)):
        sub = net.space.at({group.name: i for group, i in zip(net.space, at, strict=True)})
        model = compact(net, sub)
        found[sub] = score(model), size(model)
    return found


@pytest.fixture(scope="module")
def known(net):
    return everything(net)


def beaten(point, others) -> bool:
    return any(a >= point[0] and c <= point[1] and (a, c) != point for a, c in others)


def test_of_a_space_tried_as_a_whole_the_front_is_what_nobody_beats(small):
    net, known, calls = small, everything(small), []

    def counting(model):
        calls.append(widths(model))
        return score(model)

    front = search(net, counting, size, degree=half, trials=500)
    assert len(calls) == net.space.size == 16 == len(front.scored)
    wanted = {point for point in known.values() if not beaten(point, known.values())}
    assert {(one.accuracy, one.latency) for one in front} == wanted
    assert [one.latency for one in front] == sorted(one.latency for one in front)
    assert front.best == front[-1] and front.full.sub_adapter == net.space.maximal()
    for one in front:
        assert known[one.sub_adapter] == (one.accuracy, one.latency)


@pytest.mark.parametrize("at_most", ["65%", 1])
def test_what_is_over_the_limit_is_tried_when_nothing_else_is_left(small, at_most):
    study = optuna.create_study(directions=["maximize", "minimize"])
    space = CandidateSpace.of(small.space, ())
    study.sampler = AdditiveSampler(space, examples=10**6, room=0.4 if at_most == "65%" else -1.0)
    limits = {"at_most": at_most, "trials": 500, "starts": 2, "study": study}
    with pytest.raises(BudgetError) if at_most == 1 else contextlib.nullcontext():
        search(small, score, size, degree=half, **limits)
    assert len(study.trials) == 16  # none was proposed twice


def test_what_has_no_figures_is_tried_once_and_not_waited_for(small):
    calls = []

    def breaks(model):
        calls.append(widths(model))
        assert calls.count([48, 32]) <= 1
        return math.nan if widths(model) == [48, 32] else score(model)

    front = search(small, breaks, size, degree=half, trials=500)
    assert len(front.scored) == 15 and len(calls) == 16


@pytest.mark.parametrize("latency", [size, "params"])
def test_few_trials_find_the_best_within_the_limit(net, known, latency):
    front = search(net, score, latency, degree=half, at_most="70%", trials=24, starts=8)
    assert len(front.scored) == 24
    assert front.best.latency <= 0.7 * front.full.latency
    if latency is size:
        most = max(a for a, c in known.values() if c <= 0.7 * known[net.space.maximal()][1])
        assert front.best.accuracy == most
    else:
        assert front.best.params == front.best.latency


def test_what_is_counted_is_what_the_compact_model_has(net):
    front = search(net, score, "macs", degree=half, trials=6)
    for one in front.scored:
        cost = count(compact(net, one.sub_adapter))
        assert (one.params, one.macs, one.latency) == (cost.params, cost.macs, cost.macs)


def test_a_least_accuracy_alone_asks_for_the_cheapest(small):
    net, known = small, everything(small)
    least = 0.6 * known[net.space.maximal()][0]
    front = search(net, score, size, degree=half, min_accuracy=least, trials=500)
    cheapest = min(c for a, c in known.values() if a >= least)
    assert front.best == front[0] and front.best.latency == cheapest


def test_an_own_study_brings_its_sampler_and_goes_on(net):
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=optuna.samplers.NSGAIISampler(seed=0)
    )
    calls = []

    def counting(model):
        calls.append(1)
        return score(model)

    first = search(net, counting, size, degree=half, trials=8, study=study)
    assert len(calls) == 8 == len(first.scored)
    second = search(net, counting, size, degree=half, trials=12, study=study)
    assert len(calls) == 12 == len(second.scored)
    assert second.scored[:8] == first.scored
    assert second.study is study and isinstance(study.sampler, optuna.samplers.NSGAIISampler)
    again = search(net, counting, size, degree=half, trials=12, study=study)
    assert len(calls) == 12 and again.members == second.members


def test_an_own_study_is_told_what_limits_allow(net):
    """A sampler of its own may prefer what meets them."""
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=0)
    )
    limits = {"at_most": "70%", "min_accuracy": 0.4}
    front = search(net, score, size, degree=half, trials=8, starts=2, study=study, **limits)
    for trial, one in zip(study.trials, front.scored, strict=True):
        over = one.latency - 0.7 * front.full.latency
        expected = {"latency": over, "min_accuracy": 0.4 - one.accuracy}
        assert trial.constraints == pytest.approx(expected)
    assert {one in front.scored for one in front} == {True}


def test_noise_is_taken_out_of_a_share_of_examples(net):
    generator = torch.Generator().manual_seed(0)

    def noisy(model):
        return score(model) + 0.05 * float(torch.randn(1, generator=generator))

    front = search(net, noisy, size, degree=half, trials=32, examples=100)
    errors = [
        [abs(x - score_from(one)) for x in (one.accuracy, one.estimate)] for one in front.scored
    ]
    raw, told = (sum(column) for column in zip(*errors, strict=True))
    assert told < 0.7 * raw


def score_from(one) -> float:
    sizes = one.sub_adapter.as_dict()
    first, second = (sizes[f"model.layers.{n}.mlp_width"] for n in (0, 1))
    heads = sum(sizes[f"model.layers.{n}.attention_heads"] for n in (0, 1))
    return (5 * first + second + 2 * 8 * heads / 8) / 500


def test_what_makes_up_is_used_and_kept(net):
    degrees = []

    def degree(sub):
        degrees.append(0.25 if net.cuts(sub) else 0.0)
        return degrees[-1]

    front = search(net, score, size, degree=degree, trials=4)
    assert {one.degree for one in front.scored} == {0.0, 0.25}
    assert front.full.degree == 0.0


def test_milliseconds_come_from_a_table_that_is_measured_once(net, fake_latency, monkeypatch):
    timing = TimingConfig(prompt_tokens=4, new_tokens=1, rounds=1, max_rounds=1)
    front = search(net, score, "prefill_ms", degree=half, trials=4, timing=timing)
    assert 0 < front[0].latency < front.full.latency
    monkeypatch.setattr(latency_table, "Bench", None)  # it is known by now
    again = search(net, score, "prefill_ms", degree=half, trials=4, timing=timing)
    assert again.members == front.members


def test_a_table_is_printed(net):
    front = search(net, score, size, degree=half, trials=6)
    lines = str(front).splitlines()
    assert lines[0].split() == ["accuracy", "latency", "params"] and len(lines) == len(front) + 1
    assert lines[-1].startswith("best") and f"{front.best.params:,}" in lines[-1]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"latency": "parms"}, ConfigError, "unknown latency 'parms'; did you mean 'params'"),
        ({"at_most": "fast"}, ConfigError, "at_most is 'fast'; give a number"),
        ({"at_most": math.nan}, ConfigError, "at_most is nan"),
        ({"trials": 1}, ConfigError, "the two extremes need 2"),
        ({"accuracy": lambda _: None}, ConfigError, "accuracy gave None; it must return one num"),
        ({"latency": lambda _: "x"}, ConfigError, "latency gave 'x'"),
        ({"accuracy": lambda _: math.nan}, RunError, "accuracy nan, .*must be finite"),
        ({"at_most": 3}, BudgetError, "no sub-adapter has latency up to 3.*the fastest: accuracy"),
        ({"min_accuracy": "50%"}, ConfigError, "min_accuracy is '50%'; give a finite number"),
        ({"min_accuracy": math.nan}, ConfigError, "min_accuracy is nan"),
        ({"examples": -5}, ConfigError, "examples is -5; at least 1"),
        ({"min_accuracy": 2}, BudgetError, "accuracy from 2; .*the most accurate: accuracy"),
        ({"study": optuna.create_study()}, ConfigError, "directions="),
    ],
)
def test_what_cannot_be_searched_is_named(net, settings, error, message):
    known = dict(accuracy=score, latency=size, degree=half, trials=4)
    with pytest.raises(error, match=message):
        search(net, **(known | settings))


def test_a_space_of_one_and_failing_trials_end_the_search(net):
    group = {"dim": "width", "outputs": tiny.GATE_UP, "inputs": ["mlp.down_proj"], "choices": [64]}
    alone = {"blocks": "model.layers.*", "adapt": tiny.ATTENTION, "groups": {"width": group}}
    small = Supernet(tiny.llama(), SearchSpace.from_dict(alone), tiny.ADAPTERS["lora"])
    with pytest.raises(RunError, match="one sub-adapter alone"):
        search(small, score, size, degree=half)

    def breaks(model):
        ends = widths(model) in ([64, 64], [16, 16])
        return score(model) if ends else math.nan

    with pytest.raises(RunError, match="sub-adapters in a row have no figures"):
        search(net, breaks, size, degree=half, trials=30)
