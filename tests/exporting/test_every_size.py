"""One folder for the whole front: every slice is what exporting that sub-adapter alone writes."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic import export, search
from elastic.config import CompensationConfig, RecoveryConfig, TableConfig
from elastic.config.export import SlicesConfig
from elastic.errors import ConfigError, RunError
from elastic.exporting import command
from elastic.formats import hf, slices
from elastic.latency.latency_table import record
from elastic.latency.target import Target
from elastic.run import Run
from elastic.supernet.store import load_run
from tests.helpers import searches
from tests.helpers.exports import config
from tests.helpers.tiny_runs import ONE_ROUND, copy_run

pytestmark = pytest.mark.usefixtures("fake_latency")


@pytest.fixture(scope="module", params=["as trained", "recovered"])
def run(request, trained, fake_latency, tmp_path_factory) -> Run:
    """Of a recovered front every member may have factors of its own."""
    run = copy_run(trained, tmp_path_factory.mktemp("every") / "run")
    steps = RecoveryConfig(steps=3 * (request.param == "recovered"), base_lr=5e-3)
    made_up = CompensationConfig()
    search(searches.config(run, recover=steps, test_front=3, compensation=made_up))
    return run


@pytest.fixture(scope="module")
def folder(run):
    report = export(config(run, formats=["elastic"], compensation=CompensationConfig()))
    return report.directory / "elastic"


def test_it_has_the_front_and_the_full_model(run, folder):
    front = {one["name"]: one for one in searches.front_of(run)}
    index = slices.read(folder)
    assert set(index["slices"]) == {"full", *front}
    [table] = index["latencies"]
    assert set(table["slices"]) == {"full", *front}
    for name, one in front.items():
        about, timed = index["slices"][name], table["slices"][name]
        for key in ("sub_adapter", "accuracy", "accuracy_n", "accuracy_interval", "params", "macs"):
            assert about[key] == one[key], key
        assert timed["prefill_ms"] == (one["measured"] or one)["prefill_ms"]
    assert table["slices"]["full"]["prefill_ms"] == next(iter(front.values()))["full_prefill_ms"]
    rows = list(csv.DictReader((folder / "slices.csv").read_text().splitlines()))
    assert [row["slice"] for row in rows] == list(index["slices"])
    assert all(int(row["params"]) == index["slices"][row["slice"]]["params"] for row in rows)


def test_tables_of_other_devices_go_along(run, tmp_path):
    """Each says what every size takes there."""
    net, target = load_run(run)[2], Target.of(run, ONE_ROUND)
    table = record(net, target, ONE_ROUND, TableConfig(seen=4, unseen=1), 0)
    there = replace(target, device="a phone, onnx 1.0", runtime="onnx")
    told = {**table.as_dict(), "target": asdict(there), "about": {"device": "a phone"}}
    file = tmp_path / "phone.json"
    file.write_text(json.dumps(told))
    settings = SlicesConfig(tables=[str(file)])
    report = export(config(run, formats=["elastic"], name="phone", slices=settings))
    [here, phone] = slices.read(report.directory / "elastic")["latencies"]
    assert here["runtime"] == "torch"
    assert (phone["device"], phone["runtime"]) == ("a phone", "onnx")
    assert set(phone["slices"]) == set(here["slices"])
    for one in searches.front_of(run):
        sub = net.space.check(searches.SubAdapter(tuple(one["sub_adapter"].items())))
        for key in ("prefill_ms", "decode_ms"):
            assert phone["slices"][one["name"]][key] == table(sub)[key]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda target: target | {"model": "another"}, "another model or search space"),
        (lambda target: target | {"merged": False}, "timing.merged False"),
        (lambda target: {}, "no latency table"),
    ],
)
def test_tables_of_something_else_are_refused_before_weights_load(
    run, tmp_path, monkeypatch, spoil, message
):
    target = asdict(Target.of(run, ONE_ROUND))
    file = tmp_path / "table.json"
    parts = dict.fromkeys(("seen", "unseen", "asked", "control", "tolerance", "about"))
    file.write_text(json.dumps(parts | {"target": spoil(target)}))
    monkeypatch.setattr(command, "load_run", None)
    with pytest.raises(RunError, match=message):
        export(config(run, formats=["elastic"], slices=SlicesConfig(tables=[str(file)])))


def test_every_slice_is_the_one_that_is_written_alone(run, folder):
    for name in slices.read(folder)["slices"]:
        of_run = "maximal" if name == "full" else name
        alone = (
            export(
                config(
                    run,
                    sub_adapter=of_run,
                    name=f"alone-{name}",
                    compensation=CompensationConfig(),
                )
            ).directory
            / "hf"
        )
        dtype = torch.float32
        written, loaded = hf.load(alone, dtype), slices.load(folder, name)
        auto = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, slice=name)
        assert type(loaded).__name__ in type(written).__name__
        for model in (loaded, auto):
            assert list(model.state_dict()) == list(written.state_dict())
            for key, tensor in written.state_dict().items():
                assert torch.equal(model.state_dict()[key], tensor), f"{name}: {key}"


def test_a_base_that_is_referred_to_gives_the_same_slices(run, folder):
    with pytest.raises(ConfigError, match="add elastic to formats"):
        config(run, slices=SlicesConfig(base="reference"))
    settings = dict(slices=SlicesConfig(base="reference"), name="referring",
                    compensation=CompensationConfig())  # fmt: skip
    referring = export(config(run, formats=["elastic"], **settings)).directory / "elastic"
    assert not (referring / "base").exists()
    for name in slices.read(folder)["slices"]:
        expected = slices.load(folder, name).state_dict()
        found = slices.load(referring, name).state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name


@pytest.mark.parametrize("base", ["copy", "reference"])
def test_what_is_only_written_is_the_same_folder(run, folder, base):
    """To the byte, from a base that is mapped, not loaded; what is fitted block by block rounds
    otherwise."""
    settings = dict(compensation=CompensationConfig(), slices=SlicesConfig(base=base))
    report = export(config(run, formats=["elastic"], prove=False, name=f"only-{base}", **settings))
    only = report.directory / "elastic"
    assert "neither loaded again" in (report.directory / "report.md").read_text()
    size = sum(file.stat().st_size for file in only.rglob("*") if file.is_file())
    assert report.contents["formats"]["elastic"]["bytes"] == size
    files = {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
    written = {file.relative_to(only) for file in only.rglob("*") if file.is_file()}
    assert written == {file for file in files if base == "copy" or file.parts[0] != "base"}
    says_where = {"slices.json", "README.md", "about.json"} if base == "reference" else set()
    for file in written:
        if not file.name.startswith("front-") and file.name not in says_where:
            assert (only / file).read_bytes() == (folder / file).read_bytes(), file
    for name in slices.read(only)["slices"]:
        # Where a layer was left as it is but for rounding, one of both may have it as its own.
        found, expected = (slices.load(each, name).state_dict() for each in (only, folder))
        assert found.keys() == expected.keys()
        for tensor_name, tensor in expected.items():
            torch.testing.assert_close(found[tensor_name], tensor, rtol=1e-4, atol=1e-5)
