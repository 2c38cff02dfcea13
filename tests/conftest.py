"""Fixtures shared by all tests; builders live in tests/tiny.py."""

import gc
import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # tiny models spend longer waiting for a second thread than computing
os.environ.setdefault("HF_HUB_OFFLINE", "1")

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
    from tests.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def no_weighing(monkeypatch):
    """Exports do not start processes, which import torch for seconds: tests/test_weigh.py does."""
    from elastic.latency import weigh

    canned = [weigh.Weight(0.125, 10.0), weigh.Weight(0.25, 20.0)]
    monkeypatch.setattr(weigh, "weigh", lambda loads: canned)


@pytest.fixture
def tiny_llama():
    from tests.tiny import llama

    return llama()
