"""`elastic.load`: one folder, any size, by its name or by a budget."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import elastic
from elastic.errors import BudgetError, ConfigError, ModelError, RunError
from elastic.formats import slices
from elastic.serving import load as loading
from tests.helpers import searches, tiny
from tests.helpers.exports import config
from tests.helpers.tiny_runs import copy_run

pytestmark = pytest.mark.usefixtures("fake_latency")


@pytest.fixture(scope="module")
def folder(trained, fake_latency, tmp_path_factory):
    """Of a searched run; the table says that every slice is measured."""
    run = copy_run(trained, tmp_path_factory.mktemp("served") / "run")
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


def test_a_slice_is_saved_and_loads_again(folder, tmp_path):
    for name in slices.read(folder)["slices"]:
        by_us = elastic.load(folder, slice=name)
        by_them = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, slice=name)
        for one in (by_us, by_them):
            one.save_pretrained(tmp_path / name)
            again = AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
            torch.testing.assert_close(again.state_dict(), by_us.state_dict(), rtol=0, atol=0)
            shutil.rmtree(tmp_path / name)


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
        (lambda index: index | {"dtype": "int8"}, "unknown dtype 'int8'"),
        (lambda index: index | {"base": "elsewhere"}, "unknown base 'elsewhere'"),
        (
            lambda index: index | {"slices": {"full": index["slices"]["full"] | {"memory_mb": ""}}},
            "memory_mb: expected a finite number",
        ),
    ],
)
def test_another_index_is_refused(folder, tmp_path, spoil, message, forbid_weights):
    index = tmp_path / slices.INDEX
    index.write_text(json.dumps(spoil(slices.read(folder))))
    with pytest.raises(RunError, match=message):
        elastic.load(tmp_path, slice="full")


def test_what_is_not_there_is_named(folder, tmp_path, forbid_weights):
    with pytest.raises(RunError, match="front-99"):
        elastic.load(folder, slice="front-99")
    with pytest.raises(RunError, match=r"slices\.json: no such file"):
        elastic.load(tmp_path, slice="full")
    with pytest.raises(ConfigError, match="the one or the other"):
        elastic.load(folder, slice="full", budget=3)


@pytest.mark.parametrize("file", ["NAME.safetensors", "super_adapter/factors.safetensors",
                                  "super_adapter/order.safetensors", "slices.json"])  # fmt: skip
def test_a_file_that_was_cut_off_is_named(folder, tmp_path, file, forbid_weights):
    """Before weights load."""
    broken, name = tmp_path / "broken", "front-1"
    shutil.copytree(folder, broken)
    index = slices.read(broken)
    index["slices"][name]["own"] = True
    (broken / slices.INDEX).write_text(json.dumps(index))
    path = broken / file.replace("NAME", name)
    path.write_bytes(path.read_bytes()[:-10] if path.exists() else b"123")
    with pytest.raises(RunError, match=rf"{path.name}.*(damaged|broken JSON)"):
        elastic.load(broken, slice=name)
    if path.parent == broken:
        path.unlink()
        with pytest.raises(RunError, match=rf"{path.name}.*(not there|no such file)"):
            elastic.load(broken, slice=name)


def test_a_base_that_was_cut_off_is_named(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    for left in (-10, 100):
        file = broken / "base" / "model.safetensors"
        file.write_bytes((folder / "base" / "model.safetensors").read_bytes()[:left])
        with pytest.raises(ModelError, match=r"base: the weights cannot be loaded"):
            elastic.load(broken, slice="full")
    assert torch.is_tensor(next(elastic.load(folder, slice="full").parameters()))


@pytest.mark.parametrize("other", [{"runtime": "onnx"}, {"merged": False}])
def test_a_table_of_another_runtime_is_none(folder, tmp_path, other, forbid_weights):
    there = tmp_path / "there"
    shutil.copytree(folder, there)
    index = slices.read(there)
    index["latencies"] = [index["latencies"][0] | other]
    (there / slices.INDEX).write_text(json.dumps(index))
    with pytest.raises(RunError, match=r"budget\.prefill_ms: no latency is known of these slices"):
        elastic.load(there, budget=25)
    index["latencies"] = [index["latencies"][0] | {"runtime": "torch", "merged": True, "slices": 3}]
    (there / slices.INDEX).write_text(json.dumps(index))
    with pytest.raises(RunError, match=r"latencies: slices: expected a mapping, got 3"):
        elastic.load(there, budget=25)
