"""One copy of the weights, any size between two calls."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import DynamicCache

import elastic
from elastic.config import CompensationConfig
from elastic.errors import BudgetError, RunError
from elastic.formats import slices
from tests.helpers import searches, tiny
from tests.helpers.exports import config
from tests.helpers.laws import close

pytestmark = pytest.mark.usefixtures("fake_latency")
ROUNDED = 1e-5
"""float32: a merged weight's rows, computed with the others or alone."""


@pytest.fixture(scope="module", params=["ranks elastic", "ranks whole"])
def folder(request, tiny_folder, fake_latency, tmp_path_factory):
    """Where no size cuts a rank, the factors are merged once for all of them; where one does, what
    is cut is made up for, so that sizes have layers of their own."""
    made_up = CompensationConfig(degrees=[1.0 if request.param == "ranks elastic" else 0.0])
    declared = tiny.space_dict(heads=True)
    if request.param == "ranks whole":
        groups = declared["groups"]
        declared["groups"] = {name: one for name, one in groups.items() if one["dim"] != "rank"}
    run = searches.trained_run(tiny_folder, tmp_path_factory.mktemp("resized"), declared)
    elastic.search(searches.config(run, compensation=made_up))
    asked = config(run, formats=["elastic"], compensation=made_up)
    folder = elastic.export(asked).directory / "elastic"
    own = {about["own"] for about in slices.read(folder)["slices"].values()}
    assert own == ({True, False} if request.param == "ranks elastic" else {False})
    return folder


@pytest.fixture
def model(folder):
    return elastic.load(folder, resizable=True, slice="full")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.tokens()).logits


def test_every_size_is_the_slice_of_that_name(folder, model):
    """In any order, and what was there before comes back."""
    names = list(slices.read(folder)["slices"])
    full = logits(model)
    for name in [*names, *reversed(names)]:
        assert model.resize(name) == name
        close(logits(model), logits(elastic.load(folder, slice=name)), ROUNDED)
    with model.at(names[-1]):
        close(logits(model), logits(elastic.load(folder, slice=names[-1])), ROUNDED)
    assert torch.equal(logits(model), full)


def test_it_generates_as_the_slice_does(folder, model):
    name = list(slices.read(folder)["slices"])[-1]
    ids = tiny.tokens(1, 5)
    with model.at(name):
        found = model.generate(ids, max_new_tokens=4, do_sample=False)
    alone = elastic.load(folder, slice=name).generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, alone)


def test_it_is_no_folder_of_one_size(model, tmp_path):
    with pytest.raises(RunError, match=r"slice='full'\)\.save_pretrained\("):
        model.save_pretrained(tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_a_budget_names_the_size(folder, model):
    [table] = slices.read(folder)["latencies"]
    least = min(timed["prefill_ms"] for timed in table["slices"].values())
    name = model.resize(least)
    assert table["slices"][name]["prefill_ms"] == least
    with pytest.raises(BudgetError, match="no slice meets the budget"), model.at(least / 2):
        pass
    with pytest.raises(RunError, match="front-99"):
        elastic.load(folder, resizable=True, slice="front-99")
    assert model.sizes.current == name


def test_one_copy_of_the_weights(folder, model):
    """No size has tensors of its own but those that make up for what it cuts."""
    before = {parameter.data_ptr() for parameter in model.parameters()}
    for name, about in slices.read(folder)["slices"].items():
        model.resize(name)
        new = [p for p in model.parameters() if p.data_ptr() not in before]
        assert bool(new) == about["own"]


def test_a_cache_goes_on_at_another_width_alone(folder, model):
    """Of an MLP: heads and blocks are in it."""
    by_heads: dict[tuple, list[str]] = {}
    for name, about in slices.read(folder)["slices"].items():
        heads = tuple(v for k, v in about["sub_adapter"].items() if k.endswith("heads"))
        by_heads.setdefault(heads, []).append(name)
    assert len(by_heads) > 1, "the front has sizes of one number of heads only"
    ids, cache = tiny.tokens(), DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        other = next(names[0] for names in by_heads.values() if "full" not in names)
        model.resize(other)
        with pytest.raises(RunError, match=f"full filled them.* than {other}"):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        model.resize("full")
        assert model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits.shape[1]


def test_no_thread_changes_what_another_holds(model):
    names, entered, seen = model.sizes.names, threading.Event(), []

    def other() -> None:
        entered.wait()
        model.resize(names[-1])
        seen.append(model.sizes.current)

    thread = threading.Thread(target=other)
    thread.start()
    with model.at("full"):
        entered.set()
        thread.join(timeout=0.2)
        assert thread.is_alive() and model.sizes.current == "full"
    thread.join()
    assert seen == [names[-1]]


@pytest.mark.parametrize("first", [0, -1])
def test_another_type_is_that_of_every_size(folder, first):
    """Those that have layers of their own, too, whichever was active when it was changed."""
    names = list(slices.read(folder)["slices"])
    model = elastic.load(folder, resizable=True, slice=names[first])
    assert model.double() is model
    for name in names:
        model.resize(name)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
        close(logits(model), logits(elastic.load(folder, slice=name).double()), ROUNDED)


def test_a_copy_has_a_size_of_its_own(folder, model):
    names = list(slices.read(folder)["slices"])
    full, copied = logits(model), copy.deepcopy(model)
    with model.at("full"):  # whose lock is not the copy's
        thread = threading.Thread(target=copied.resize, args=(names[1],))
        thread.start()
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert (model.sizes.current, copied.sizes.current) == ("full", names[1])
    assert torch.equal(logits(model), full)
    close(logits(copied), logits(elastic.load(folder, slice=names[1])), ROUNDED)
