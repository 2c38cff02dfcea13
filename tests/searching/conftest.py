"""A search that several files look at."""

from __future__ import annotations

import pytest

from elastic.config import BudgetConfig
from elastic.searching.objective import Objective
from elastic.searching.study import search
from tests.helpers.searches import config
from tests.helpers.tiny_runs import copy_run


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


# What a search leaves behind.


@pytest.fixture(scope="module")
def searched(trained, fake_latency, tmp_path_factory):
    """(run, front) of a search with a budget that some sub-adapters miss."""
    run = copy_run(trained, tmp_path_factory.mktemp("searched") / "run")
    budget = BudgetConfig(prefill_ms="85%", min_accuracy=0.1)
    return run, search(config(run, trials=16, starts=6, budget=budget))
