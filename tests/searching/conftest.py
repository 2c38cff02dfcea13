"""A search that several files look at."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from elastic.config import BudgetConfig
from elastic.latency import bench
from elastic.latency.measure import Latency
from elastic.searching.objective import Objective
from elastic.searching.study import search
from tests.helpers.searches import SPEED, config
from tests.helpers.tiny_runs import copy_run, decode_of, measurement, prefill_of


@pytest.fixture
def asked(monkeypatch):
    """Every sub-adapter the objective was called with, in order."""
    seen = []
    call = Objective.__call__

    def spied(self, sub, *rivals):
        seen.append(sub)
        return call(self, sub, *rivals)

    monkeypatch.setattr(Objective, "__call__", spied)
    return seen


@pytest.fixture
def fake_graphs(monkeypatch, tmp_path):
    """Nothing is written: a model and its compression take as long as their size and mode say."""
    opened = []

    def open_runner(timing, model, directory, compress=None):
        opened.append(compress)
        size = sum(parameter.numel() for parameter in model.parameters())
        return SimpleNamespace(size=size, mode=compress)

    def measure(runners, timing, **_):
        found = {
            name: Latency(
                prefill_of(each.size) * SPEED[each.mode], decode_of(each.size) * SPEED[each.mode], 0
            )
            for name, each in runners.items()
        }
        return measurement(found, timing)

    monkeypatch.setattr(bench, "open_runner", open_runner)
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    return opened


# What a search leaves behind.


@pytest.fixture(scope="module")
def searched(trained, fake_latency, tmp_path_factory):
    """(run, front) of a search with a budget that some sub-adapters miss."""
    run = copy_run(trained, tmp_path_factory.mktemp("searched") / "run")
    budget = BudgetConfig(prefill_ms="85%", min_accuracy=0.1)
    return run, search(config(run, trials=16, starts=6, budget=budget))
