"""What was made before the packages were (made_before/make.py) still loads: run, study, export."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from elastic.__main__ import main
from elastic.formats import hf, onnx, openvino
from elastic.run import Run
from elastic.supernet.store import load_run
from tests.helpers import tiny
from tests.helpers.tiny_runs import snapshot

BEFORE = Path(__file__).parent / "made_before"
TOLERANCE = 1e-4
"""Of the largest logit: float32 sums in another order, on another processor."""
TIMING = ["--timing.prompt_tokens", "4", "--timing.new_tokens", "1", "--timing.rounds", "1",
          "--timing.max_rounds", "1"]  # fmt: skip
SEARCH = ["search", "run", "--starts", "4", "--objectives", "accuracy,params", "--test_front", "3",
          *TIMING]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy, in the folder it is found from: its paths are relative."""
    shutil.copytree(BEFORE, tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")
    return Run("run")


@pytest.fixture(scope="module")
def expected():
    return load_file(BEFORE / "expected.safetensors")


def close(found, expected) -> None:
    found = torch.as_tensor(found)
    atol = TOLERANCE * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def trials(run: Run) -> list[dict]:
    return list(csv.DictReader((run.search / "trials.csv").read_text().splitlines()))


@pytest.mark.parametrize("name", ["maximal", "minimal", "heuristic", "best"])
def test_a_run_computes_what_it_did(run, expected, name):
    _, _, net = load_run(run)
    with net.active(run.resolve(name, net.space)[1]) as model:
        close(tiny.logits(model, expected["ids"]), expected[name])


def test_a_run_is_known_as_trained(run, capsys):
    before = snapshot(run.path)
    assert main(["train", "--config", str(run.config_file)]) == 0
    assert "already trained" in capsys.readouterr().err
    assert snapshot(run.path) == before


def test_a_study_goes_on(run, fake_latency, capsys):
    before = trials(run)
    assert main([*SEARCH, "--trials", "8"]) == 0
    again = trials(run)  # with columns that were not known then
    assert [{name: row[name] for name in before[0]} for row in again] == before
    assert main([*SEARCH, "--trials", "10"]) == 0
    after = trials(run)
    assert len(after) == 10
    for old, new in zip(before, after, strict=False):
        for name in ("accuracy", "params", "macs", "correct", "sub_adapter"):
            assert new[name] == old[name]


@pytest.mark.parametrize("kind", ["hf", "onnx", "openvino"])
def test_an_export_computes_what_it_did(expected, kind):
    folder = BEFORE / "run" / "export" / "heuristic" / kind
    if kind == "hf":
        found = tiny.logits(hf.load(folder, torch.float32), expected["ids"])[:, -1]
    else:
        found = (
            {"onnx": onnx, "openvino": openvino}[kind]
            .open_runner(folder, threads=1)
            .prefill(expected["ids"].numpy())
        )
    close(found, expected["heuristic"][:, -1])


def test_an_export_is_made_again_with_the_same_report(run, fake_latency):
    """The same keys in the same order, new ones between them, and the same of everything that is
    no time; what is cut was not made up for then."""
    file = run.path / "export" / "heuristic" / "report.json"
    before = json.loads(file.read_text())
    formats = "hf,peft,onnx,openvino"
    arguments = ["export", "run", "--sub_adapter", "heuristic", "--formats", formats, *TIMING]
    arguments += ["--compensation.degrees", "0"]
    assert main(arguments) == 0
    after = json.loads(file.read_text())
    assert [key for key in after if key in before] == list(before)
    for name in ("sub_adapter", "params", "full_params", "macs", "accuracy", "accuracy_n"):
        assert after[name] == before[name], name
    for kind, written in before["formats"].items():
        keys = [key for key in after["formats"][kind] if key in written]
        assert keys == list(written), kind
        if "path" in written:
            assert after["formats"][kind]["greedy_tokens_equal"] is True
