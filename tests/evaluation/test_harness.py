"""lm-evaluation-harness and perplexity: whatever runs the model, the figures are the same."""

import dataclasses
import functools
import json
import math
import sys

import numpy as np
import pytest
import torch

from elastic.config import CompensationConfig, EvaluateConfig, ExportConfig, StageConfig
from elastic.errors import ConfigError, DataError, DataMissing, MissingExtra, RunError
from elastic.evaluation.command import evaluate_run
from elastic.evaluation.harness import _file, runner_model
from elastic.evaluation.perplexity import window_losses
from elastic.exporting.command import export
from elastic.formats.runner import runner_of
from elastic.supernet.store import load_run
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.tiny_runs import ONE_ROUND, randomize_factors, train_config

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}} "
doc_to_target: {target}
{more}
"""
CHOICES = "doc_to_choice: ['yes', 'no', 'maybe']\nmetric_list: [{metric: acc}]"
WORDS = (
    "metric_list: [{metric: exact_match}]\n"
    "generation_kwargs: {until: [q], max_gen_toks: 6, do_sample: false}"
)


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    settings = dict(stages=[StageConfig()], ranks="elastic")
    run = train_one(train_config(tiny_folder, folder / "run", **settings))
    randomize_factors(run)
    return run


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"is {n} odd?", "label": n % 3, "words": str(n)} for n in range(12)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind, target, more in [
        ("mine_choices", "multiple_choice", "label", CHOICES),
        ("mine_words", "generate_until", "words", WORDS),
        ("mine_code", "generate_until", "words", f"unsafe_code: true\n{WORDS}"),
    ]:
        text = TASK.format(name=name, data=data, kind=kind, target=target, more=more)
        (folder / f"{name}.yaml").write_text(text)
    return folder


def config(run, tasks, **settings) -> EvaluateConfig:
    known = dict(run=str(run.path), harness=["mine_choices", "mine_words"],
                 harness_tasks=str(tasks), run_code=True, sub_adapter="minimal")  # fmt: skip
    return EvaluateConfig(**(known | settings))


def test_a_runner_says_what_the_harness_reads_from_the_model():
    """Token by token without batches, as from one batched pass."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny.llama(dtype=torch.float32), tiny.tokenizer()
    whole = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    mine = runner_model(runner_of(model), tokenizer)
    pairs = [
        ("a question", " yes"),
        ("another, longer one ", "no"),
        ("x", " perhaps so"),
        ("", "a"),
    ]

    def asked(kind: str, arguments: list[tuple]) -> list:
        return [Instance(kind, {}, each, n) for n, each in enumerate(arguments)]

    requests = asked("loglikelihood", pairs)
    for one, other in zip(mine.loglikelihood(requests), whole.loglikelihood(requests), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    texts = asked("loglikelihood_rolling", [("some text",), ("b",)])
    np.testing.assert_allclose(
        mine.loglikelihood_rolling(texts), whole.loglikelihood_rolling(texts), atol=1e-4
    )
    free = mine.generate_until(asked("generate_until", [("ab", {"max_gen_toks": 8})]))[0]
    stop = free[3]
    settings = {"until": [stop], "max_gen_toks": 8, "do_sample": False}
    requests = asked(
        "generate_until", [(text, settings) for text, _ in pairs[:3]] + [("ab", settings)]
    )
    found = mine.generate_until(requests)
    assert found == whole.generate_until(requests)
    assert found[3] == free.split(stop)[0] and len(free) > len(found[3])
    with pytest.raises(ConfigError, match="answer greedily"):
        mine.generate_until(asked("generate_until", [("a", {"do_sample": True})]))


def test_one_file_has_everything_and_every_runtime_agrees(run, tasks, capsys):
    report = evaluate_run(config(run, tasks))
    report.show()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["sub_adapter"] == "minimal"
    kept = json.loads(report.file.read_text())
    assert kept["n"] == {"mine_choices": 12, "mine_words": 12}
    assert len(kept["samples"]["mine_choices"]) == 12 and kept["sub_adapter"]
    right = [row["acc"] for row in kept["samples"]["mine_choices"]]
    accuracy = kept["results"]["mine_choices"]["acc"]
    assert accuracy["value"] == pytest.approx(np.mean(right))
    low, high = accuracy["interval"]
    half = 1.96 * np.std(right, ddof=1) / math.sqrt(12)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3)
    export(ExportConfig(run=str(run.path), sub_adapter="minimal", formats=["onnx", "openvino"],
                        timing=ONE_ROUND, accuracy=False,
                        compensation=CompensationConfig(sequential=False)))  # fmt: skip
    for runtime in ("onnx", "openvino"):
        other = evaluate_run(config(run, tasks, exported=runtime))
        assert other.file != report.file
        found = json.loads(other.file.read_text())
        assert found["results"] == kept["results"]
        for name in kept["samples"]:
            said = [[row["filtered_resps"] for row in each["samples"][name]]
                    for each in (kept, found)]  # fmt: skip
            if name == "mine_words":
                assert said[0] == said[1]
    some = evaluate_run(config(run, tasks, examples=5, harness=["mine_choices"]))
    assert some.counts == {"mine_choices": 5} and "first-5" in some.file.name


def test_tasks_of_a_folder_are_programs(run, tasks):
    """A template of theirs runs outside any sandbox, and `!function` imports what lies beside."""
    with pytest.raises(ConfigError, match=r"harness_tasks .*: templates and functions"):
        config(run, tasks, run_code=False)


def test_what_cannot_be_asked_is_named(run, tasks, monkeypatch):
    import lm_eval.tasks

    alone = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **settings: alone(
        include_path=settings["include_path"]
    ))  # fmt: skip  # of its own tasks there are thousands
    with pytest.raises(
        ConfigError, match="unknown task 'mine_choice'; did you mean 'mine_choices'"
    ):
        evaluate_run(config(run, tasks, harness=["mine_choice"]))
    with pytest.raises(RunError, match="nothing was exported there; exported were: "):
        evaluate_run(config(run, tasks, sub_adapter="heuristic", exported="onnx"))
    assert evaluate_run(config(run, tasks, harness=["mine_code"])).counts
    with pytest.raises(ConfigError, match="tasks and text: give one of them"):
        EvaluateConfig(tasks=["math"], text="x")
    with pytest.raises(ConfigError, match="exported goes with harness"):
        EvaluateConfig(exported="onnx")
    with pytest.raises(ConfigError, match="exported and chat"):
        EvaluateConfig(harness=["x"], exported="onnx", chat=True)
    many = config(run, tasks, harness=[f"mine_{'x' * n}" for n in range(40)])
    assert len(_file(run, many).name) < 160
    assert _file(run, many) != _file(run, dataclasses.replace(many, harness=many.harness[:-1]))
    chatty = dataclasses.replace(many, chat=True)
    assert _file(run, chatty) != _file(run, many)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MissingExtra, match=r"elastic-adapters\[eval\]"):
        evaluate_run(config(run, tasks))


def test_perplexity_is_that_of_the_tokens(run, tmp_path, capsys):
    text = "Once upon a time, and so on. " * 4
    file = tmp_path / "story.txt"
    file.write_text(text)
    _, base, net = load_run(run)
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])
    sub = net.space.minimal()
    with net.active(sub) as model, torch.no_grad():
        whole = model(input_ids=ids, labels=ids).loss.exp().item()
        found = evaluate_run(EvaluateConfig(
            run=str(run.path), sub_adapter="minimal", text=str(file), window=128,
            compensation=CompensationConfig(degrees=[0.0]),
        ))  # fmt: skip
        assert found.value == pytest.approx(whole, rel=1e-5) and found.interval is None
        rest = ids[0, 1:].tolist()
        losses, counts = window_losses(model, rest, 10, tiny.BOS)
        window = torch.cat([ids[:, :1], ids[:, 11:21]], 1)  # every window has its beginning
        by_hand = model(input_ids=window, labels=window).loss.item()
        assert sum(counts) == len(rest) and losses[1] == pytest.approx(by_hand, rel=1e-5)
        losses, counts = window_losses(model, rest, 10)
        by_hand = model(input_ids=ids[:, 11:22], labels=ids[:, 11:22]).loss.item()
        assert sum(counts) == len(rest) - 1 and losses[1] == pytest.approx(by_hand, rel=1e-5)
    found = evaluate_run(EvaluateConfig(run=str(run.path), text=str(file), window=10))
    low, high = found.interval
    assert low < found.value < high and found.tokens == ids.shape[1] - 1
    found.show()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["windows"] == len(counts)
    with pytest.raises(ConfigError, match="window 5000: the model has 256 positions"):
        evaluate_run(EvaluateConfig(run=str(run.path), text=str(file), window=5000))
    with pytest.raises(DataMissing, match="no such file"):
        evaluate_run(EvaluateConfig(run=str(run.path), text="nowhere.txt", window=10))
    file.write_text("")
    with pytest.raises(DataError, match="at least 2 are needed"):
        evaluate_run(EvaluateConfig(run=str(run.path), text=str(file), window=10))
