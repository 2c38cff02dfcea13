"""`elastic.load`: one folder, any size, by its name or by a budget."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import elastic
from elastic.errors import BudgetError, ConfigError, RunError
from elastic.formats import slices
from elastic.serving import load as loading
from tests.helpers import searches, tiny
from tests.helpers.exports import config

pytestmark = pytest.mark.usefixtures("fake_latency")


@pytest.fixture(scope="module")
def folder(tiny_folder, fake_latency, tmp_path_factory):
    """Of a searched run; the table says that every slice is measured."""
    run = searches.trained_run(tiny_folder, tmp_path_factory.mktemp("served"))
    elastic.search(searches.config(run))
    return elastic.export(config(run, formats=["elastic"])).directory / "elastic"


def params(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_slice_by_its_name_is_a_plain_model(folder):
    """It generates, and is trained, as any other."""
    for name, about in slices.read(folder)["slices"].items():
        model = elastic.load(folder, slice=name)
        assert type(model).__module__.startswith("transformers.")
        assert params(model) == about["params"]
        assert model.generate(tiny.tokens(1, 5), max_new_tokens=3, do_sample=False).shape == (1, 8)
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_budget_leads_to_a_slice(folder, capsys):
    [table] = slices.read(folder)["latencies"]
    least = min(timed["prefill_ms"] for timed in table["slices"].values())
    known = slices.read(folder)["slices"]
    small = elastic.load(folder, budget=least)
    assert params(small) == min(about["params"] for about in known.values())
    best = elastic.load(folder)
    assert [about["params"] for about in known.values() if about.get("best")] == [params(best)]
    with pytest.raises(BudgetError, match=r"no slice meets the budget \(prefill_ms"):
        elastic.load(folder, budget=least / 2)


def test_transformers_alone_gives_the_same_size(folder):
    """By the classes in the folder."""
    [table] = slices.read(folder)["latencies"]
    times = sorted({timed["prefill_ms"] for timed in table["slices"].values()})
    for wanted in ({}, {"slice": "full"}, *({"budget": one} for one in times)):
        auto = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **wanted)
        expected = elastic.load(folder, **wanted).state_dict()
        assert list(auto.state_dict()) == list(expected)
        assert all(torch.equal(auto.state_dict()[name], x) for name, x in expected.items())


def test_nothing_in_the_folder_is_run(folder, tmp_path):
    there = tmp_path / "there"
    shutil.copytree(folder, there)
    code = sorted(file.name for file in there.glob("*.py"))
    assert code == ["any_size.py", "choosing.py", "modeling_elastic.py"]
    for name in code:
        (there / name).write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nraise SystemExit")
    for one in ({"slice": "full"}, {"budget": "90%"}, {"slice": "full", "resizable": True}):
        elastic.load(there, **one)
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_known_is_measured(folder, tmp_path, monkeypatch, capsys):
    """At full size, with the prompt of the table."""
    there = tmp_path / "there"
    shutil.copytree(folder, there)
    index = slices.read(there)
    [table] = index["latencies"]
    table["device"] = "a phone"
    (there / slices.INDEX).write_text(json.dumps(index))
    timed = []

    def measure(runners, timing, **_):
        timed.append((params(runners["full"].model), timing.prompt_tokens))
        return searches.Measured(2 * table["slices"]["full"]["prefill_ms"], 1.0)

    monkeypatch.setattr(loading, "measure", measure)
    least = 2 * min(row["prefill_ms"] for row in table["slices"].values())
    small = elastic.load(there, budget=1.001 * least)
    assert timed == [(index["slices"]["full"]["params"], table["prompt_tokens"])]
    assert params(small) == min(about["params"] for about in index["slices"].values())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda index: index | {"version": 99}, "version 99, and this one reads up to 1"),
        (lambda index: index | {"slices": {"../up": {}}}, "is no name"),
        (lambda index: {k: v for k, v in index.items() if k != "dtype"}, "dtype is missing"),
        (lambda index: "slices", "expected a mapping"),
    ],
)
def test_another_index_is_refused(folder, tmp_path, spoil, message):
    index = tmp_path / slices.INDEX
    index.write_text(json.dumps(spoil(slices.read(folder))))
    with pytest.raises(RunError, match=message):
        elastic.load(tmp_path, slice="full")


def test_what_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(RunError, match="front-99"):
        elastic.load(folder, slice="front-99")
    with pytest.raises(RunError, match=r"slices\.json: no such file"):
        elastic.load(tmp_path, slice="full")
    with pytest.raises(ConfigError, match="the one or the other"):
        elastic.load(folder, slice="full", budget=3)


def test_a_file_that_was_cut_off_is_named(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    name = next(n for n, about in slices.read(folder)["slices"].items() if n != "full")
    index = slices.read(broken)
    index["slices"][name]["own"] = True
    (broken / slices.INDEX).write_text(json.dumps(index))
    (broken / f"{name}.safetensors").write_bytes(b"123")
    with pytest.raises(RunError, match=rf"{name}\.safetensors: damaged"):
        elastic.load(broken, slice=name)
    factors = broken / "super_adapter" / "factors.safetensors"
    factors.write_bytes(factors.read_bytes()[:-10])
    with pytest.raises(RunError, match="damaged"):
        elastic.load(broken, slice="full")
    assert torch.is_tensor(next(elastic.load(folder, slice="full").parameters()))
