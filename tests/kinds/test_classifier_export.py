"""What a classifier was trained to say is what every runtime says; it decodes nothing."""

import dataclasses
import json

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from elastic.config import (
    BudgetConfig,
    CompensationConfig,
    ExportConfig,
    LatencyConfig,
    MergeAdapterConfig,
    MergeConfig,
    SearchConfig,
    TableConfig,
    TimingConfig,
)
from elastic.data import load_task
from elastic.exporting.command import export
from elastic.formats import hf, onnx
from elastic.formats import openvino as openvino_format
from elastic.formats.runner import runner_of
from elastic.latency import bench
from elastic.latency.command import time_run
from elastic.latency.measure import measure
from elastic.models import loading
from elastic.models.kinds import classes_of
from elastic.run import Run
from elastic.searching.study import search
from elastic.supernet.compact import compact
from elastic.supernet.store import load_run
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.classification import classifier_config
from tests.helpers.clock import FakeRunner, Machine
from tests.helpers.tiny_runs import ONE_ROUND, fake_measure, randomize_factors

OTHERS = ["roberta", "llama"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = train_one(classifier_config(tmp_path_factory.mktemp("bert"), task={"second": "{other}"}))
    randomize_factors(run)
    return run


@pytest.fixture(scope="module")
def written(run):
    return exported(run, ["hf", "onnx", "openvino"], "heuristic")


def exported(run: Run, formats: list[str], sub: str) -> dict:
    nothing = CompensationConfig(degrees=[0.0])
    settings = ExportConfig(
        run=str(run.path), sub_adapter=sub, formats=formats, timing=ONE_ROUND, compensation=nothing
    )
    return export(settings).contents


def test_every_format_says_what_the_supernet_says(run, written):
    full = exported(run, ["peft"], "maximal")
    for name, each in {**written["formats"], **full["formats"]}.items():
        assert each["greedy_tokens_equal"], name
        assert each["max_abs_diff"] <= 2e-4 * each["largest_logit"], name
        assert each["decode_ms"] == each["full_decode_ms"] == 0
    assert written["params"] < written["full_params"] and written["accuracy_n"] == 16


def test_a_user_loads_it_and_reads_the_classes(run, written):
    """With the names of the classes in place; pairs as tokenizers give them."""
    _, _, net = load_run(run)
    small = compact(net, net.space.named("heuristic"))
    folder = run.path / "export" / "heuristic"
    # Half the heads of a BERT are no BERT that a configuration could describe.
    loaded = AutoModelForSequenceClassification.from_pretrained(
        folder / "hf", trust_remote_code=True
    )
    assert classes_of(loaded) == ("no", "yes")
    tokenizer = AutoTokenizer.from_pretrained(folder / "onnx")
    config = json.loads((folder / "onnx" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"}
    pairs = load_task(run.config().task, 0).test[:4]
    batch = tokenizer(
        [example.prompt for example in pairs], [example.second for example in pairs],
        padding=True, return_token_type_ids=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        expected = small(**batch).logits.numpy()
        np.testing.assert_allclose(loaded(**batch).logits.numpy(), expected, atol=1e-5)
        del batch["token_type_ids"]
        assert not np.allclose(small(**batch).logits.numpy(), expected, atol=1e-3)
    batch = tokenizer(
        [example.prompt for example in pairs], [example.second for example in pairs],
        padding=True, return_token_type_ids=True, return_tensors="np",
    )  # fmt: skip
    feeds = {name: np.asarray(array, np.int64) for name, array in batch.items()}
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    np.testing.assert_allclose(session.run(["logits"], feeds)[0], expected, atol=1e-5)
    compiled = openvino.Core().compile_model(
        folder / "openvino" / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    np.testing.assert_allclose(compiled(feeds)["logits"], expected, atol=1e-5)


def test_merging_changes_what_is_below_the_head_alone(run, tmp_path, capsys):
    """A head is of its own classes: of others neither values nor numbers are mixed in, which is
    said."""
    exported(run, ["peft"], "maximal")
    adapter = run.path / "export" / "maximal" / "peft"
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["no", "yes"]
    trained = run.config()
    model = dataclasses.replace(trained.model, classes=["no", "yes", "perhaps"])
    other = train_one(dataclasses.replace(trained, run=str(tmp_path / "other"), model=model))
    _, _, net = load_run(run)
    for path in (adapter, other.path):
        merge = MergeConfig(adapters=[MergeAdapterConfig(path=str(path))])
        report = export(ExportConfig(run=str(run.path), sub_adapter="maximal", formats=["hf"],
                                     name=path.name, timing=ONE_ROUND, merge=merge))  # fmt: skip
        state = load_file(report.directory / "hf" / "model.safetensors")
        for name, head in net.head.items():
            torch.testing.assert_close(state[name], head.detach())
        told = " ".join(capsys.readouterr().err.split())
        assert "what it trained of its head" in told and next(iter(net.head)) in told
        norms = [entry["norm"] for entry in report.contents["merge"]["adapters"]]
        assert len(norms) == 2 and norms[0] > 0


@pytest.mark.parametrize("family", OTHERS)
def test_other_kinds_of_model(family, tmp_path):
    """Written from a model that was cut, without training it."""
    from elastic.supernet.discovery import space_for
    from elastic.supernet.supernet import Supernet

    config = classifier_config(tmp_path, family, model={"classes": ["no", "maybe", "yes"]})
    base = loading.load(config.model)
    net = tiny.randomize_(Supernet(base.model, space_for(config), config.adapter))
    small = compact(net, net.space.minimal())
    ids = tiny.tokens(2, 9).numpy()
    expected = runner_of(small).prefill(ids)
    hf.write(small, base.tokenizer, tmp_path / "hf")
    reloaded = runner_of(hf.load(tmp_path / "hf", torch.float32)).prefill(ids)
    np.testing.assert_array_equal(reloaded, expected)
    graph = onnx.write(small, tmp_path / "onnx")
    for runner in (onnx.OnnxRunner(graph), openvino_format.OpenVINORunner(
        openvino_format.write(graph, tmp_path / "openvino"))):  # fmt: skip
        np.testing.assert_allclose(runner.prefill(ids), expected, rtol=0, atol=1e-5)


def test_a_search_trades_accuracy_for_the_time_of_a_batch(run, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", fake_measure)
    front = search(SearchConfig(
        run=str(run.path), trials=6, starts=3, timing=ONE_ROUND, test_front=2,
        table=TableConfig(seen=4, unseen=0),
        budget=BudgetConfig(prefill_ms="80%"),
    ))  # fmt: skip
    assert front.best.figures.prefill_ms <= 0.8 * front.full.prefill_ms
    front.show()
    assert "sub_adapter" not in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_nothing_is_decoded(run, monkeypatch):
    machine = Machine()
    runners = {"full": FakeRunner(machine, "full", 4.0, 1.0),
               "small": FakeRunner(machine, "small", 2.0, 1.0)}  # fmt: skip
    found = measure(runners, TimingConfig(prompt_tokens=3, new_tokens=0, rounds=4, max_rounds=4),
                    vocabulary=9, clock=machine.clock)  # fmt: skip
    assert found.latencies["small"].prefill_ms == 2000
    assert found.latencies["small"].decode_ms == found.full.decode_ms == 0
    assert found.ratios["small"].prefill_ms == 0.5 and found.ratios["small"].decode_ms == 1
    assert found.control == 0 and not runners["full"].tokens
    report = time_run(LatencyConfig(
        run=str(run.path), sub_adapter="minimal",
        timing=TimingConfig(prompt_tokens=4, rounds=2, max_rounds=2, tolerance=1e9),
    ))  # fmt: skip
    report.show()
    told = report.as_dict()
    assert told["prefill_ms"] > 0 and told["decode_ms"] == told["tokens_per_second"] == 0
