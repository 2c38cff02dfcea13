"""Super-adapters of several tasks on one base model in memory."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import elastic
from elastic.config import CompensationConfig
from elastic.config.export import SlicesConfig
from elastic.errors import BaseMismatch, ConfigError, RunError
from elastic.formats import slices
from elastic.supernet.store import MOMENTS, ORDER
from tests.helpers import searches, tiny
from tests.helpers.exports import config
from tests.helpers.laws import close

pytestmark = pytest.mark.usefixtures("fake_latency")
ROUNDED = 1e-5
"""float32: an update merged into weights, or computed beside them."""


def exported(run, base: str = "reference"):
    elastic.search(searches.config(run, compensation=CompensationConfig()))
    asked = config(run, formats=["elastic"], slices=SlicesConfig(base=base))
    return elastic.export(asked).directory / "elastic"


@pytest.fixture(scope="module")
def folders(tiny_folder, fake_latency, tmp_path_factory):
    """Two tasks on one base, in other spaces and other orders of channels."""
    found = {}
    for task, heads in (("letters", True), ("numbers", False)):
        folder = tmp_path_factory.mktemp(task)
        run = searches.trained_run(tiny_folder, folder, tiny.space_dict(heads=heads))
        if task == "numbers":  # the other way round
            order = load_file(run.super_adapter / ORDER)
            turned = {name: index.flip(-1).contiguous() for name, index in order.items()}
            save_file(turned, run.super_adapter / ORDER)
            (run.super_adapter / MOMENTS).unlink()
        found[task] = exported(run)
    return found


@pytest.fixture
def model(folders):
    return elastic.load(folders)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.tokens()).logits


def test_every_size_of_every_task_is_the_slice_of_that_name(folders, model):
    """Whatever was active before, and what was there before comes back."""
    wanted = [(task, name) for task in folders for name in slices.read(folders[task])["slices"]]
    assert {task for task, _ in wanted} == set(model.adapters)
    for task, name in [*wanted, *wanted[::-2]]:
        assert model.adapters[task].resize(name) == name
        close(logits(model), logits(elastic.load(folders[task], slice=name)), ROUNDED)
    model.adapters["letters"].resize("full")
    before = logits(model)
    with model.adapters["numbers"].at("full"):
        close(logits(model), logits(elastic.load(folders["numbers"], slice="full")), ROUNDED)
    assert torch.equal(logits(model), before)


def test_what_was_there_comes_back_whatever_the_block_did(model):
    model.adapters["letters"].resize("full")
    before = logits(model)
    with model.adapters["letters"].at(model.adapters["letters"].names[-1]):
        model.adapters["numbers"].resize("full")
    assert model.sizes is model.adapters["letters"]
    assert torch.equal(logits(model), before)


def base_of(model) -> dict[str, torch.Tensor]:
    """The tensors that no task has brought, whichever of their layers run at sizes."""
    found = {name.replace(".base.", "."): p for name, p in model.named_parameters()}
    return {name: p for name, p in found.items() if ".adapter." not in name}


def test_weights_of_the_base_exist_once(folders, model):
    """No task brings any, and going from one to the other and back moves no bit for good."""
    known, places = {}, {}
    for task in [*folders, *folders]:
        model.adapters[task].resize("full")
        for name, weight in base_of(model).items():
            assert places.setdefault(name, weight.data_ptr()) == weight.data_ptr()
            assert torch.equal(known.setdefault((task, name), weight.clone()), weight)
    one, other = folders
    assert any(not torch.equal(known[one, name], known[other, name]) for name in places)


def test_a_cache_of_another_task_is_refused(model):
    ids, cache = tiny.tokens(), DynamicCache()
    model.adapters["letters"].resize("full")
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        model.adapters["numbers"].resize("full")
        with pytest.raises(RunError, match="of another super-adapter filled them"):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        model.adapters["letters"].resize("full")
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)


def test_no_thread_takes_the_model_from_a_task(model):
    entered, seen = threading.Event(), []

    def other() -> None:
        entered.wait()
        model.adapters["numbers"].resize("full")
        seen.append(model.sizes)

    thread = threading.Thread(target=other)
    thread.start()
    with model.adapters["letters"].at("full"):
        entered.set()
        thread.join(timeout=0.2)
        assert thread.is_alive() and model.sizes is model.adapters["letters"]
    thread.join()
    assert seen == [model.adapters["numbers"]]


def test_other_bases_are_refused(folders, tmp_path):
    run = searches.trained_run(tiny.save_tiny(tmp_path / "base", seed=1), tmp_path)
    with pytest.raises(BaseMismatch, match="no base model in common"):
        elastic.load({"letters": folders["letters"], "other": exported(run)})
    with pytest.raises(ConfigError, match="no folder"):
        elastic.load({})
