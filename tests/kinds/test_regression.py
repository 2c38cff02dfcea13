"""A head that answers with a number, as GLUE's STS-B wants one."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from elastic.config import (
    EvaluateConfig,
    ExportConfig,
    ModelConfig,
    SearchConfig,
    TableConfig,
    TrainConfig,
)
from elastic.data import load_task
from elastic.data.answers import answer_loss
from elastic.data.encoding import encode_example
from elastic.data.task import Example
from elastic.errors import ConfigError, DataError
from elastic.evaluation import statistics
from elastic.evaluation.command import evaluate_run
from elastic.evaluation.evaluate import evaluate
from elastic.exporting.command import export
from elastic.latency import bench
from elastic.models import loading
from elastic.run import Run
from elastic.searching.study import search
from elastic.supernet.store import load_run
from elastic.training.one_task import train_one
from tests.helpers.classification import LETTERS, classifier_config
from tests.helpers.tiny_runs import ONE_ROUND, fake_measure


def rows(number=lambda a, b: abs(ord(a) - ord(b)) / 2) -> list[dict]:
    return [{"one": f"{a} {b}", "score": number(a, b)} for a in LETTERS for b in LETTERS]


def config_of(folder, numbers: list[dict], **overrides) -> TrainConfig:
    """Numbers from 0 to 3.5 for pairs of letters."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", numbers[::2] + numbers[1::4]), ("test", numbers[3::4])):
        (folder / f"{name}.numbers").write_text("".join(json.dumps(row) + "\n" for row in part))
    task = {"train": str(folder / "train.numbers"), "test": str(folder / "test.numbers"),
            "answer": "score", "tolerance": 1.0}  # fmt: skip
    return classifier_config(folder, model={"head": "regression"}, task=task, **overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_one(config_of(tmp_path_factory.mktemp("numbers"), rows()))


def test_the_loss_is_the_squared_error():
    logits = torch.tensor([[[1.0]], [[4.0]]], requires_grad=True)
    labels, teacher = torch.tensor([[2.0], [4.5]]), torch.tensor([[[0.0]], [[4.0]]])
    hard, soft = (1 + 0.25) / 2, 1 / 2
    assert answer_loss(logits, labels).item() == pytest.approx(hard)
    mixed = answer_loss(logits, labels, teacher, 0.25)
    assert mixed.item() == pytest.approx(0.75 * hard + 0.25 * soft)
    mixed.backward()
    assert logits.grad.flatten().tolist() == pytest.approx([0.75 * -1 + 0.25 * 1, 0.75 * -0.5])


def test_training_learns_the_numbers(run):
    losses = [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()
              if '"loss"' in line]  # fmt: skip
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:2])
    assert run.config().model.classes == ["score"]
    _, base, net = load_run(run)
    assert base.model.config.problem_type == "regression" and base.model.config.num_labels == 1
    assert set(net.head) == {"classifier.weight", "classifier.bias",
                             "bert.pooler.dense.weight", "bert.pooler.dense.bias"}  # fmt: skip


def test_right_is_what_is_near_enough(run):
    config, base, net = load_run(run)
    examples = load_task(config.task, config.seed).test
    encoded = [encode_example(base.tokenizer, net.model, example) for example in examples]
    with torch.no_grad():
        values = [float(net.model(torch.tensor([one.ids])).logits) for one in encoded]
    for tolerance in (0.0, 0.3, 1.0, 10.0):
        asked = [dataclasses.replace(one, tolerance=tolerance) for one in examples]
        expected = tuple(
            abs(value - float(one.answer)) <= tolerance
            for value, one in zip(values, examples, strict=True)
        )
        for tokens in (1, 64, 2048):
            found = evaluate(net.model, base.tokenizer, asked, batch_tokens=tokens)
            assert found.correct == expected
    assert [float(said) for said in found.said] == pytest.approx(values, rel=1e-4)


def test_evaluate_reports_correlations(run, capsys):
    evaluate_run(EvaluateConfig(run=str(run.path), sub_adapter="maximal", split="test")).show()
    out = capsys.readouterr().out
    told = json.loads(out.splitlines()[-1])
    assert "(Pearson)" in out and -1 <= told["spearman"] <= 1
    config, base, net = load_run(run)
    examples = load_task(config.task, config.seed).test
    score = evaluate(net.model, base.tokenizer, examples)
    said, expected = [float(one) for one in score.said], [float(one.answer) for one in examples]
    assert told["pearson"] == pytest.approx(np.corrcoef(expected, said)[0, 1])
    assert told["accuracy"] == score.accuracy
    lines = (run.path / "evaluate/maximal-test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["right"] for row in rows] == list(score.correct)
    assert [float(row["said"]) for row in rows] == said
    assert [row["prompt"] for row in rows] == [example.text for example in examples]


def test_evaluate_computes_in_another_type(run):
    asked = EvaluateConfig(run=str(run.path), sub_adapter="maximal", dtype="bfloat16")
    said = [float(text) for text in evaluate_run(asked).score.said]
    config, base, net = load_run(run, "bfloat16")
    score = evaluate(net.model, base.tokenizer, load_task(config.task, config.seed).test)
    assert said == [float(text) for text in score.said]
    assert said != [float(text) for text in evaluate_run(EvaluateConfig(
        run=str(run.path), sub_adapter="maximal")).score.said]  # fmt: skip
    assert (run.path / "evaluate/maximal-test-bfloat16.jsonl").is_file()


def test_ranks_of_equal_numbers_are_their_mean():
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5 of spreads 4.5 and 5.
    assert statistics.spearman([1, 2, 2, 3], [1, 30, 2, 400]) == pytest.approx(4.5 / 22.5**0.5)
    assert statistics.spearman([1, 2, 3], [5, 5, 5]) == 0.0
    assert statistics.spearman([1, 2, 3], [9.5, 9, -1]) == -1.0


def test_searched_and_written(run, monkeypatch):
    monkeypatch.setattr(bench, "measure", fake_measure)
    search(SearchConfig(run=str(run.path), trials=4, starts=3, timing=ONE_ROUND, test_front=2,
                        table=TableConfig(seen=4, unseen=0)))  # fmt: skip
    report = export(ExportConfig(run=str(run.path), sub_adapter="minimal", timing=ONE_ROUND,
                                 formats=["hf", "onnx", "openvino"]))  # fmt: skip
    for kind in ("hf", "onnx", "openvino"):
        assert report.contents["formats"][kind]["max_abs_diff"] < 1e-4
    folder = report.directory / "hf"
    again = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    assert again.config.problem_type == "regression" and again.config.num_labels == 1


def test_a_saved_head_goes_on(run, tmp_path):
    """Its architecture says that it answers with a number."""
    report = export(ExportConfig(run=str(run.path), sub_adapter="maximal", timing=ONE_ROUND,
                                 formats=["hf"], name="whole"))  # fmt: skip
    saved = ModelConfig(path=str(report.directory / "hf"), dtype="float32", device="cpu")
    assert loading.regresses(saved)
    _, base, net = load_run(run)
    example = Example("a b", "1.5")
    loaded = loading.load(dataclasses.replace(saved, classes=["score"]))
    values = [
        float(model(torch.tensor([encode_example(base.tokenizer, model, example).ids])).logits)
        for model in (net.model, loaded.model)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_answers_that_are_no_numbers_are_refused_before_weights_load(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("weights were loaded"))
    for wrong in ("much", "nan", "inf"):
        numbers = rows(lambda *_, wrong=wrong: wrong)
        with pytest.raises(DataError, match=f"answer '{wrong}' is no number"):
            train_one(config_of(tmp_path / wrong, numbers))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"head": "regression", "classes": ["a", "b"]}, "a regression head has none"),
        ({"classes": ["a"]}, "one class tells nothing apart"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**settings)


def test_the_recipe_of_sts_b_is_complete():
    from elastic.config.parsing import parse

    config = parse(TrainConfig, ["--config", "lonas-bert-stsb-train"])
    assert (config.model.head, config.task.subset) == ("regression", "stsb")
    assert Run(config.run).path.name == "lonas-bert-stsb"
