"""What several files ask of latency tables."""

import pytest

from elastic.latency import bench
from tests.helpers.tiny_runs import fake_measure


@pytest.fixture
def counted(monkeypatch):
    """What was timed beside the full model, in order."""
    timed = []

    def counting(runners, *args, **kwargs):
        timed.extend(name for name in runners if name != "full")
        return fake_measure(runners, *args, **kwargs)

    monkeypatch.setattr(bench, "measure", counting)
    return timed


@pytest.fixture
def nothing_known(monkeypatch, tmp_path):
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
