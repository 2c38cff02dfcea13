"""Every limit is kept, in the unit it was given in; one that nobody meets is refused as early
as it can be known."""

import re
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest

from elastic import __main__
from elastic.config import BudgetConfig, CompensationConfig, SearchConfig
from elastic.errors import BudgetError
from elastic.models import loading
from elastic.searching.budget import met, room
from elastic.searching.finalists import best_of, preference
from elastic.searching.front import Evaluated, Measured
from elastic.searching.objective import Figures
from elastic.searching.study import search
from elastic.spaces.bound import Candidate, SubAdapter
from elastic.supernet.compact import compact
from elastic.supernet.cost import count
from elastic.supernet.store import load_run
from tests.helpers.searches import config, data_of
from tests.helpers.tiny_runs import copy_run, prefill_of

pytestmark = pytest.mark.usefixtures("fake_latency")


def test_another_budget_reuses_what_was_evaluated(searched, tmp_path, asked):
    first, front = searched
    run = copy_run(first, tmp_path / "run")
    limit = sorted(one.figures.params for one in front.trials)[4]
    again = search(config(run, trials=16, starts=6, budget=BudgetConfig(params=limit)))
    assert not asked
    visited = [[one.sub_adapter for one in found.trials] for found in (again, front)]
    assert visited[0] == visited[1]
    assert all(member.figures.params <= limit for member in again.members)
    assert {one.feasible for one in again.trials} == {True, False}


def test_percentages_are_of_the_full_model(trained, tmp_path):
    run = copy_run(trained, tmp_path / "run")
    counted = count(loading.skeleton(run.config().model))
    budget = BudgetConfig(
        prefill_ms="90%", decode_ms="99%", params="85%", macs="90 %", max_accuracy_drop="50%",
        tokens_per_second="101%", memory_mb="98%",
    )  # fmt: skip
    front = search(config(run, budget=budget, trials=10))
    full = front.full
    expected = {
        "prefill_ms": 0.9 * full.prefill_ms,
        "decode_ms": 0.99 * full.decode_ms,
        "params": 0.85 * counted.params,
        "macs": 0.9 * counted.macs,
        "memory_mb": 0.98 * full.memory_mb,
        "min_accuracy": 0.5 * front.trials[0].estimate,  # what feasibility is judged by, too
        "tokens_per_second": 1.01 * 1000 / full.decode_ms,
    }
    assert front.limits == pytest.approx(expected)
    for member in front.members:
        for name, value in member.figures.budget_values().items():
            least = name in ("min_accuracy", "tokens_per_second")
            value = member.estimate if name == "min_accuracy" else value
            assert value >= expected[name] if least else value <= expected[name]


def test_a_throughput_bounds_what_is_proposed(trained, tmp_path):
    run = copy_run(trained, tmp_path / "run")
    budget = BudgetConfig(tokens_per_second="130%")
    front = search(config(run, trials=14, objectives=["accuracy", "decode_ms"], budget=budget))
    full = front.full.tokens_per_second
    proposed = [one.figures.tokens_per_second for one in front.trials[6:]]
    assert min(proposed) > 1.28 * full
    assert all(
        one.feasible is (one.figures.tokens_per_second >= 1.3 * full) for one in front.trials
    )


@pytest.mark.parametrize(
    "limits, expected",
    [
        ({}, None),
        ({"prefill_ms": 88.0}, 0.8),
        ({"decode_ms": 40.0}, 0.5),
        ({"tokens_per_second": 25.0}, 0.5),  # 40 ms, in the middle of 20 to 60
        ({"prefill_ms": 90.0, "tokens_per_second": 25.0, "params": 8.0}, 0.3),
        ({"min_accuracy": 0.9}, None),
        ({"params": 25.0}, 2.0),
    ],
)
def test_the_room_limit_says_how_much_room_there_is(limits, expected):
    """Costs of (full, minimal) here: prefill 100 and 40, decode 60 and 20, parameters 15 and 5."""
    costs = {
        "full": {"prefill_ms": 100.0, "decode_ms": 60.0, "tokens_per_second": 1000 / 60},
        "least": {"prefill_ms": 40.0, "decode_ms": 20.0, "tokens_per_second": 50.0},
    }
    costs["full"]["params"], costs["least"]["params"] = 15.0, 5.0
    objective = SimpleNamespace(
        space=SimpleNamespace(maximal=lambda: "full"), costs=costs.get,
        smallest=lambda: [costs["least"]], config=SearchConfig(),
    )  # fmt: skip
    assert room(limits, objective) == (expected and pytest.approx(expected))


@pytest.mark.parametrize("name", ["params", "macs"])
def test_an_uncountable_budget_is_refused_before_weights(trained, tmp_path, forbid_weights, name):
    run = copy_run(trained, tmp_path / "run")
    with pytest.raises(BudgetError, match=rf"budget\.{name} 10 is below the minimal"):
        search(config(run, budget=BudgetConfig(**{name: 10.0})))
    assert not run.search.exists()


@pytest.mark.parametrize("name", ["prefill_ms", "decode_ms"])
def test_a_latency_nobody_meets_ends_after_the_extremes(trained, tmp_path, asked, capsys, name):
    run = copy_run(trained, tmp_path / "run")
    arguments = ["search", str(run.path), f"--budget.{name}", "0.001", "--trials", "8"]
    assert __main__.main(arguments) == 2
    space = load_run(run)[2].space
    assert [one.sub_adapter for one in asked] == [space.maximal(), space.minimal()]
    error = capsys.readouterr().err
    assert f"{name} 0.001" in error
    fastest = prefill_of(count(compact(load_run(run)[2], space.minimal())).params)
    said_fastest, said_best = error.split("The fastest:")[1].split("The most accurate:")
    prefill = float(re.search(r"prefill (\S+) ms", said_fastest)[1])
    assert prefill == pytest.approx(fastest, rel=0.01)
    assert "on validation" in said_best
    assert not run.front.exists()


def test_a_budget_nobody_meets_is_refused_by_what_is_known(searched, tmp_path, asked):
    run = copy_run(searched[0], tmp_path / "run")
    with pytest.raises(BudgetError, match="no sub-adapter meets the budget"):
        search(config(run, trials=30, starts=6, budget=BudgetConfig(decode_ms=0.001)))
    assert not asked


@pytest.mark.parametrize(
    "limits, objectives, costs",
    [
        ({}, [], ["prefill_ms"]),
        ({"params": "80%"}, [], ["prefill_ms"]),
        ({"prefill_ms": 3, "decode_ms": 3}, [], ["prefill_ms"]),
        ({"decode_ms": 3}, [], ["decode_ms"]),
        ({"tokens_per_second": 3}, [], ["decode_ms"]),
        ({"decode_ms": 3}, ["macs", "accuracy", "params"], ["macs", "params"]),
        ({"tokens_per_second": 3, "params": 3}, ["accuracy"], ["decode_ms", "params"]),
        ({"min_accuracy": 0.5}, ["accuracy"], ["prefill_ms"]),
    ],
)
def test_what_is_traded_follows_the_objectives_and_the_budget(limits, objectives, costs):
    asked = SearchConfig(budget=BudgetConfig(**limits), objectives=objectives)
    assert asked.costs == costs
    assert asked.chosen_objectives == (["accuracy"] if objectives == ["accuracy"] else
                                       ["accuracy", *costs])  # fmt: skip


def test_accuracy_alone_under_a_budget(trained, tmp_path):
    """Nearly everything proposed is at the limit, and the front still shows what costs less."""
    run = copy_run(trained, tmp_path / "run")
    budget = BudgetConfig(params="85%")
    settings = dict(trials=14, budget=budget, compensation=CompensationConfig())
    front = search(config(run, objectives=["accuracy"], **settings))
    limit = 0.85 * front.full.params
    assert front.costs == ["params"] and front.limits == {"params": pytest.approx(limit)}
    proposed = [one.figures.params for one in front.trials[4:]]
    other = copy_run(trained, tmp_path / "other")
    traded = search(config(other, objectives=["accuracy", "params"], **settings))
    lower = [one.figures.params for one in traded.trials[4:]]
    assert max(proposed) <= limit and statistics.mean(proposed) > statistics.mean(lower)
    assert front.best.estimate == max(one.estimate for one in front.trials if one.feasible)
    drawn = data_of(run)
    assert drawn["cost"] == "params" and drawn["axis"]["unit"] == "M"


def test_accuracy_alone_with_an_accuracy_limit_looks_for_the_cheapest(trained, tmp_path):
    run = copy_run(trained, tmp_path / "run")
    budget = BudgetConfig(min_accuracy=0.05)
    front = search(config(run, trials=14, objectives=["accuracy"], budget=budget))
    proposed = [one.figures.params for one in front.trials[4:]]
    assert min(proposed) < 0.75 * front.full.params
    assert front.best.figures.prefill_ms == min(one.figures.prefill_ms for one in front.members)


def test_the_order_of_objectives_makes_no_other_study(trained, tmp_path):
    run = copy_run(trained, tmp_path / "run")
    search(config(run, trials=3, objectives=["macs", "accuracy"]))
    again = search(config(run, trials=4, objectives=["accuracy", "macs"]))
    assert len(again.trials) == 4 and again.costs == ["macs"]


@pytest.mark.parametrize("sampler", ["additive", "nsga3"])
def test_three_objectives(trained, tmp_path, sampler):
    run = copy_run(trained, tmp_path / "run")
    objectives = ["accuracy", "decode_ms", "macs"]
    front = search(config(run, trials=10, objectives=objectives, sampler=sampler))
    assert front.costs == ["decode_ms", "macs"]
    members = [(one.figures.decode_ms, one.figures.macs, -one.estimate) for one in front.members]
    assert members == sorted(members)
    for one in front.trials:
        point = (one.figures.decode_ms, one.figures.macs, -one.estimate)
        assert any(all(a <= b for a, b in zip(m, point, strict=True)) for m in members)
        assert not any(all(a < b for a, b in zip(point, m, strict=True)) for m in members)


def test_a_study_keeps_its_objective(trained, tmp_path):
    run = copy_run(trained, tmp_path / "run")
    first = search(config(run, trials=4, budget=BudgetConfig(prefill_ms="95%")))
    again = search(config(run, trials=5, budget=BudgetConfig(decode_ms="99%")))
    assert first.costs == again.costs == ["prefill_ms"]
    other = copy_run(trained, tmp_path / "other")
    assert search(config(other, trials=2, budget=BudgetConfig(decode_ms="99%"))).costs == [
        "decode_ms"
    ]


def evaluated(estimate: float, prefill_ms: float) -> Evaluated:
    figures = Figures(
        accuracy=0.1, accuracy_n=10, prefill_ms=prefill_ms, decode_ms=prefill_ms / 10,
        tokens_per_second=1e4 / prefill_ms, memory_mb=1.0, params=1, macs=1,
    )  # fmt: skip
    return Evaluated(Candidate(SubAdapter(())), figures, estimate, feasible=True)


def timed(prefill_ms: float, *, trusted: bool = True) -> Measured:
    return Measured(prefill_ms, prefill_ms / 10, 0.0, trusted)


@pytest.mark.parametrize(
    "limits, measured, best",
    [
        ({"prefill_ms": 30.0}, [10, 20, 30], 3),
        ({"prefill_ms": 30.0}, [10, 20, 31], 2),
        ({"prefill_ms": 30.0}, [31, 40, 50], 1),
        ({"prefill_ms": 30.0}, [31, 29, 50], 2),
        ({"tokens_per_second": 400.0}, [10, 20, 30], 2),  # 1000, 500 and 333 as measured
        ({"min_accuracy": 0.65}, [10, 20, 30], 2),  # after recovery some may be below it
        ({"min_accuracy": 0.6}, [10, 20, 30], 1),  # accuracy alone is limited: the cheapest
        ({"min_accuracy": 0.6, "prefill_ms": 30.0}, [10, 20, 30], 3),
        ({}, [99, 99, 99], 3),
    ],
)
def test_the_best_meets_the_budget_as_measured(limits, measured, best):
    chosen = [evaluated(0.5 + 0.1 * n, 10.0 * n) for n in (1, 2, 3)]
    times = [timed(ms) for ms in measured]
    assert best_of(chosen, times, "prefill_ms", limits) == best
    unsure = [
        replace(each, least_prefill_ms=10.0 * n, least_decode_ms=float(n))
        for n, each in enumerate(times, 1)
    ]
    as_predicted = min(
        (n for n in (1, 2, 3) if met(chosen[n - 1].judged, limits)),
        key=lambda n: preference(chosen[n - 1], "prefill_ms", limits),
    )
    busy = [replace(each, trusted=False) for each in times]
    for unknown in (unsure, busy, [None] * 3):
        assert best_of(chosen, unknown, "prefill_ms", limits) == as_predicted


def test_a_best_one_over_the_budget_as_measured_says_so(trained, tmp_path, monkeypatch, capsys):
    run = copy_run(trained, tmp_path / "run")
    front = search(config(run, budget=BudgetConfig(prefill_ms="95%")))
    front.show()
    assert "None meets the budget as measured" not in capsys.readouterr().out
    limit = front.limits["prefill_ms"]
    best = replace(front.best, measured=timed(limit + 1))
    replace(front, members=[best]).show()
    said = capsys.readouterr().out
    assert f"None meets the budget as measured; {best.name} has prefill_ms" in said
    unsure = replace(best.measured, least_prefill_ms=limit - 1)
    replace(front, members=[replace(best, measured=unsure)]).show()
    said = capsys.readouterr().out
    assert f"As measured {best.name} has prefill_ms" in said and "None meets" not in said


def test_an_accuracy_nobody_reaches_is_reported_at_the_end(trained, tmp_path, asked):
    run = copy_run(trained, tmp_path / "run")
    with pytest.raises(BudgetError, match="most accurate"):
        search(config(run, budget=BudgetConfig(min_accuracy=1.0)))
    assert len(asked) == 8
