"""Fixtures shared by all tests; builders live in tests/helpers/."""

from __future__ import annotations

import gc
import os
import sys

import pytest
import torch
from hypothesis import settings

from tests.helpers.once import fitting_once, reading_once

# Tiny models spend longer waiting for a second thread than computing.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


os.environ.setdefault("HF_HUB_OFFLINE", "1")


# As `elastic.formats` does it; some tests import OpenVINO first.
os.environ.setdefault("CI", "true")


# Few examples: one of them builds a model. No deadline: the machine may be busy.
settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True)


settings.load_profile("quick")


def pytest_collection_finish():
    """Every training run asks for a whole garbage collection, most of whose time would go to the
    modules that are loaded by now."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(request, tmp_path_factory):
    """Latency tables of tiny models are none of the user's. With -m slow the real base models are
    wanted, whose unpacking takes half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        if request.config.option.markexpr != "slow":
            patch.setenv("ELASTIC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved tiny model with its tokenizer; do not write into it."""
    from tests.helpers.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))


# What every test would pay for again. Of the session: runs and exports that a module shares are
# made before what belongs to one test.


@pytest.fixture(scope="session", autouse=True)
def no_weighing():
    """Exports start no processes, which import torch for seconds; latency/test_weigh.py does."""
    from elastic.latency import weigh

    canned = [weigh.Weight(0.125, 10.0), weigh.Weight(0.25, 20.0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weigh, "weigh", lambda loads: canned)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk():
    """A process that is killed loses nothing that it wrote; a search waits a hundred times for what
    only a power cut would lose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def few_words():
    """Exports note what every model answers to three prompts: a few tokens tell as much."""
    with pytest.MonkeyPatch.context() as patch:
        for module in collected("elastic.exporting.proof"):
            patch.setattr(module, "TEXT_TOKENS", 4)
        yield


@pytest.fixture(scope="session", autouse=True)
def fits_once():
    """That a space fits a model is found out once of each."""
    modules = collected(
        "elastic.training.one_task", "elastic.training.dry_run", "elastic.attached.attach"
    )
    with pytest.MonkeyPatch.context() as patch:
        fitting_once(patch, *modules)
        yield


@pytest.fixture(scope="session", autouse=True)
def reads_once():
    """That the settings of a run make sense is found out once of all its copies."""
    with pytest.MonkeyPatch.context() as patch:
        reading_once(patch)
        yield


def collected(*names):
    """Those of these modules that some test has imported: what takes long to import is not imported
    to be patched."""
    return [sys.modules[name] for name in names if name in sys.modules]


@pytest.fixture
def tiny_llama():
    from tests.helpers.tiny import llama

    return llama()


@pytest.fixture(scope="session")
def trained_once(tiny_folder, tmp_path_factory):
    """What `trained` is a copy of."""
    from tests.helpers.searches import trained_run

    return trained_run(tiny_folder, tmp_path_factory.mktemp("once"))


@pytest.fixture(scope="module")
def trained(trained_once, tmp_path_factory):
    """A trained run; searches use copies of it."""
    from tests.helpers.tiny_runs import copy_run

    return copy_run(trained_once, tmp_path_factory.mktemp("study") / "run")


@pytest.fixture(scope="module")
def fake_latency(tmp_path_factory):
    """Latency follows from the number of parameters; what is measured is kept apart."""
    from elastic.latency import bench
    from tests.helpers.tiny_runs import fake_measure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "measure", fake_measure)
        patch.setenv("ELASTIC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """Drawing takes longer than these searches; the one in `searched`, made before this, draws."""
    for module in collected("elastic.searching.front"):
        monkeypatch.setattr(module, "draw", lambda front, path: None)


@pytest.fixture
def forbid_weights(monkeypatch):
    from elastic.models import loading

    def load(*_, **__):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(loading, "load_model", load)
