"""An export asks the full model what it asks the compact one, and says who is who."""

import pytest
import torch

from elastic.evaluation.statistics import Score, paired, wilson
from elastic.exporting import command, contract, targets
from elastic.exporting.command import export
from tests.helpers import tiny
from tests.helpers.exports import active_logits, config, logits_close


def scores(report, kind: str) -> tuple:
    found = report.contents["formats"][kind]
    return found["accuracy"], found["full_accuracy"], found["difference"]


def test_the_full_model_is_asked_the_same_examples_once_in_every_runtime(run, monkeypatch):
    """In torch the whole test split, elsewhere so many of it. Canned answers, the full model's and
    the compact one's all different, show who is beside whom."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("nncf")
    asked = []

    def canned(**answers):
        def answering(*args, label, **kwargs):
            asked.append((label, len(args[-1])))
            return Score(tuple(number < answers[label.split()[2]] for number in range(8)))

        return answering

    monkeypatch.setattr(command, "evaluate", canned(compact=5, full=7))
    monkeypatch.setattr(contract, "score", canned(compact=2, full=6))
    report = export(config(run, sub_adapter="minimal", formats=["hf", "onnx"], accuracy=True,
                           compress=["int8"], runtime_examples=5))  # fmt: skip
    assert asked == [
        ("scoring the compact model in onnx", 5),
        ("scoring the full model in onnx", 5),
        ("scoring the compact model in onnx", 5),  # with int8
        ("scoring the compact model", 8),
        ("scoring the full model", 8),
    ]
    assert scores(report, "hf") == (5 / 8, 7 / 8, -2 / 8)
    assert scores(report, "onnx") == scores(report, "onnx-int8") == (2 / 8, 6 / 8, -4 / 8)
    assert report.contents["formats"]["onnx"]["difference_interval"] == list(paired(0, 4, 8))
    assert report.contents["formats"]["hf"]["full_accuracy_interval"] == list(wilson(7, 8))
    assert report.contents["accuracy"] == 5 / 8
    card = (report.directory / "hf" / "README.md").read_text()
    assert "the full model reaches 87.5% and this one 62.5%" in card


def test_who_is_asked_is_who_the_label_says(run, nets, monkeypatch):
    """By logits, in torch and in a runtime of its own."""
    pytest.importorskip("onnxruntime")
    net, ids, seen = nets["float32"], tiny.tokens(1, 9), {}

    def scored(runner, *args, label, **kwargs):
        seen[label] = torch.from_numpy(runner.prefill(ids.numpy()))
        return Score((True,))

    def evaluated(model, *args, label, **kwargs):
        seen[label] = tiny.logits(model, ids)[:, -1]
        return Score((True,))

    monkeypatch.setattr(contract, "score", scored)
    monkeypatch.setattr(command, "evaluate", evaluated)
    export(config(run, sub_adapter="minimal", formats=["hf", "onnx"], accuracy=True, name="asked"))
    for which, sub in (("compact", net.space.minimal()), ("full", net.space.maximal())):
        expected = active_logits(net, sub, ids)[:, -1]
        for label in (f"scoring the {which} model", f"scoring the {which} model in onnx"):
            logits_close(seen.pop(label), expected)
    assert not seen


def test_nothing_is_asked_where_no_example_is(run, monkeypatch):
    pytest.importorskip("onnxruntime")
    for module, name in ((command, "evaluate"), (contract, "score"), (targets, "evaluate")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("asked"))
    report = export(
        config(run, sub_adapter="minimal", formats=["hf", "onnx"], runtime_examples=0, name="none")
    )
    assert {scores(report, kind) for kind in ("hf", "onnx")} == {(None, None, None)}
