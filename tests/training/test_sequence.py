"""A sequence freezes the past, scores everything seen, and resumes where it was killed."""

import dataclasses
import json
import random
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic.config import (
    AdapterConfig,
    ScheduleConfig,
    SequenceConfig,
    StageConfig,
    TaskConfig,
    TrainConfig,
)
from elastic.data.task import Example
from elastic.errors import BaseMismatch, ConfigError, DataError, RunError
from elastic.evaluation import evaluate
from elastic.evaluation.evaluate import answers, same_text
from elastic.evaluation.statistics import Score
from elastic.models import loading
from elastic.run import Run
from elastic.supernet.store import load_run
from elastic.training import one_task, sequence
from elastic.training.command import train
from elastic.training.sequence import Sequential, stage_config
from elastic.training.trainer import ElasticTrainer
from tests.helpers import tiny
from tests.helpers.tiny_runs import copy_run, snapshot, train_config

TASKS = ["colours", "sizes", "tastes"]
LABELS = {"colours": ["red", "blue"], "sizes": ["big", "tiny"], "tastes": ["sour", "sweet"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three tasks, two labels each."""
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    for name, labels in LABELS.items():
        for split, count in (("train", 24), ("test", 6)):
            rows = [
                {
                    "sentence": f"{name[:2]} {split[:2]}{i} {generator.random():.3f}",
                    "label": labels[i % 2],
                    "options": labels,
                }
                for i in range(count)
            ]
            file = folder / f"{name}.{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(tiny_folder, data, run, method="olora", **overrides) -> TrainConfig:
    settings = dict(
        adapter=dataclasses.replace(tiny.ADAPTERS[method], rank=4),
        space=tiny_space(run.parent),
        tasks=TASKS,
        task=TaskConfig(
            name="jsonl",
            train=str(data / "{task}.train.jsonl"),
            test=str(data / "{task}.test.jsonl"),
            prompt="{options}: {sentence}",
            answer="label",
            train_examples=16,
            validation_examples=4,
            test_examples=6,
        ),
        sequence=SequenceConfig(new_tokens=4, batch=4),
        stages=[StageConfig()],
        lr=ScheduleConfig(base_lr=0.01, shape="constant"),
        order="activation",
    )
    return train_config(tiny_folder, run, **(settings | overrides))


def tiny_space(folder) -> str:
    import yaml

    declared = tiny.space_dict()
    for group in declared["groups"].values():
        if group["dim"] == "rank":
            group["choices"] = [1.0, 0.5]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump(declared))
    return str(file)


def factors(run: Run, number: int) -> dict[str, torch.Tensor]:
    folder = sequence.stage_path(run, number, TASKS[number]) / "super_adapter"
    return load_file(folder / "factors.safetensors")


@pytest.fixture(scope="module")
def finished(tiny_folder, data, tmp_path_factory):
    run = tmp_path_factory.mktemp("sequence") / "run"
    return train(config(tiny_folder, data, run))


def test_every_seen_task_is_scored_after_each(finished):
    assert [len(row) for row in finished.scores] == [1, 2, 3]
    for number, name in enumerate(TASKS):
        folder = sequence.stage_path(finished.run, number, name) / "predictions"
        assert sorted(file.stem for file in folder.iterdir()) == sorted(TASKS[: number + 1])
        for seen, score in zip(TASKS, finished.scores[number], strict=False):
            rows = [json.loads(line) for line in (folder / f"{seen}.jsonl").open()]
            assert len(rows) == 6
            for row in rows:
                assert row["answer"] in LABELS[seen]
                assert row["correct"] == (row["prediction"].lower() == row["answer"])
            assert score.correct == tuple(row["correct"] for row in rows)


def test_predictions_are_the_trained_models_own(finished):
    stage = Run(sequence.stage_path(finished.run, 1, TASKS[1]))
    _, base, net = load_run(stage)
    file = stage.path / "predictions" / f"{TASKS[0]}.jsonl"
    rows = [json.loads(line) for line in file.open()]
    for row in rows[:3]:  # one at a time, by hand
        ids = base.tokenizer(row["prompt"])["input_ids"]
        text = []
        for _ in range(4):
            logits = tiny.logits(net.model, torch.tensor([ids + text]))
            text.append(int(logits[0, -1].argmax()))
            if text[-1] == base.tokenizer.eos_token_id:
                break
        assert base.tokenizer.decode(text, skip_special_tokens=True).strip() == row["prediction"]


def test_files_of_a_sequence(finished):
    found = json.loads((finished.run.path / "continual.json").read_text())
    assert found["tasks"] == TASKS and found["method"] == "olora" and found["n"] == [6, 6, 6]
    assert found["average_accuracy"] == finished.average
    assert found["name_in_prompt"] is False
    assert (finished.run.path / "continual.png").read_bytes().startswith(b"\x89PNG")


def test_a_sequence_without_the_libraries_that_draw_is_whole(
    finished, tmp_path, monkeypatch, capsys
):
    copied = dataclasses.replace(finished, run=copy_run(finished.run, tmp_path / "run"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    copied.save()
    assert snapshot(copied.run.path).keys() == snapshot(finished.run.path).keys() - {
        "continual.png"
    }
    copied.show()
    assert "elastic-adapters[plots]" in capsys.readouterr().out


def test_the_past_is_frozen_and_the_order_kept(finished):
    first, second, third = (factors(finished.run, number) for number in range(3))
    site = "model.layers.0.mlp.up_proj"
    assert len(first[f"{site}.A_old"]) == 0
    assert torch.equal(second[f"{site}.A_old"], first[f"{site}.A"])
    assert torch.equal(third[f"{site}.A_old"][:4], first[f"{site}.A"])
    assert torch.equal(third[f"{site}.B_old"][:, 4:], second[f"{site}.B"])
    assert not torch.equal(third[f"{site}.A"], second[f"{site}.A"])
    orders = [
        (sequence.stage_path(finished.run, n, name) / "super_adapter/order.safetensors")
        .read_bytes()
        for n, name in enumerate(TASKS)
    ]  # fmt: skip
    assert orders[0] == orders[1] == orders[2]


def test_new_factors_are_kept_away_from_the_old(tiny_folder, data, tmp_path):
    """The overlap that lambda_1 punishes: smaller than without it."""
    overlap = {}
    for weight in (0.0, 5.0):
        adapter = AdapterConfig(
            method="olora", rank=4, olora=dataclasses.replace(
                tiny.ADAPTERS["olora"].olora, lambda_1=weight, lambda_2=0.0)
        )  # fmt: skip
        run = tmp_path / str(weight)
        own = dict(adapter=adapter, tasks=TASKS[:2], stages=[StageConfig(epochs=4)])
        found = train(config(tiny_folder, data, run, **own))
        state = factors(found.run, 1)
        overlap[weight] = sum(
            float((state[name.replace(".A_old", ".A")] @ tensor.T).abs().sum())
            for name, tensor in state.items()
            if name.endswith("A_old")
        )
    assert overlap[5.0] < 0.7 * overlap[0.0]


@pytest.mark.parametrize("method", ["lora", "sorsa", "prolora", "soslora"])
def test_any_method_continues_its_own_factors(tiny_folder, data, tmp_path, method, monkeypatch):
    started = []
    real = one_task.continued

    def remembered(*args):
        net = real(*args)
        started.append({k: v.clone() for k, v in net.factor_state().items()})
        return net

    monkeypatch.setattr(one_task, "continued", remembered)
    found = train(config(tiny_folder, data, tmp_path / "run", method=method, tasks=TASKS[:2]))
    assert len(started) == 1
    for name, tensor in factors(found.run, 0).items():
        assert torch.equal(started[0][name], tensor), name
    assert any(not torch.equal(started[0][k], v) for k, v in factors(found.run, 1).items())


@pytest.mark.parametrize("moment", ["in training", "in testing", "between"])
def test_a_killed_sequence_resumes(finished, tiny_folder, data, tmp_path, monkeypatch, moment):
    settings = config(tiny_folder, data, tmp_path / "run")
    seen = []
    if moment == "in training":
        real = ElasticTrainer.training_step

        def step(self, *args, **kwargs):
            seen.append(0)
            if len(seen) == 4:  # two steps a task: in the second task
                raise KeyboardInterrupt
            return real(self, *args, **kwargs)

        patch = (ElasticTrainer, "training_step", step)
    else:
        real = evaluate.answers

        def tested(*args, **kwargs):
            seen.append(0)
            if len(seen) == 3:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        patch = (sequence, "answers", tested)
        if moment == "between":
            patch = (one_task, "continued", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with monkeypatch.context() as context:
        context.setattr(*patch)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    again = train(settings)
    assert again.scores == finished.scores
    for number in range(3):
        for name, tensor in factors(finished.run, number).items():
            assert torch.equal(tensor, factors(again.run, number)[name]), name


def test_a_finished_sequence_is_not_trained_again(finished, tiny_folder, data, monkeypatch):
    def forbidden(*_, **__):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(loading, "load_model", forbidden)
    settings = config(tiny_folder, data, finished.run.path)
    assert train(settings).scores == finished.scores


def test_a_sequence_is_olora_unless_told_otherwise(tiny_folder, data, tmp_path):
    adapter = dataclasses.replace(tiny.ADAPTERS["lora"], method="auto", rank=4, alpha=None)
    settings = config(tiny_folder, data, tmp_path / "run", adapter=adapter, tasks=TASKS[:1])
    found = train(settings)
    assert found.run.begun().adapter.method == "olora"
    assert "model.layers.0.mlp.up_proj.A_old" in factors(found.run, 0)
    assert train(settings).scores == found.scores  # the same command finds it finished
    assert adapter.resolved_method == "lora"


def test_a_sequence_names_its_stages_where_one_run_is_needed(finished):
    with pytest.raises(RunError, match=r"is a sequence of tasks; name one: .*02-sizes"):
        finished.run.config()


def test_another_space_cannot_be_continued_in(finished, tiny_folder, data, tmp_path):
    before = sequence.stage_path(finished.run, 0, TASKS[0])
    settings = config(
        tiny_folder, data, tmp_path / "run", tasks=TASKS[1:], start_from=str(before), space="llama"
    )
    with pytest.raises(ConfigError, match="another search space than llama"):
        train(settings)


def scores(*rows: list[int]) -> list[list[Score]]:
    """Of ten examples each."""
    return [[Score((True,) * right + (False,) * (10 - right)) for right in row] for row in rows]


def test_figures_of_a_matrix_by_hand():
    found = Sequential(Run("x"), "abc", scores([8], [9, 6], [5, 4, 7]))
    assert found.average == pytest.approx((0.5 + 0.4 + 0.7) / 3)
    assert found.backward_transfer == pytest.approx(((0.5 - 0.8) + (0.4 - 0.6)) / 2)
    assert found.forgetting == pytest.approx(((0.9 - 0.5) + (0.6 - 0.4)) / 2)
    alone = Sequential(Run("x"), "a", scores([8]))
    assert (alone.average, alone.backward_transfer, alone.forgetting) == (0.8, 0, 0)


def test_lists_give_each_task_its_own_settings(tiny_folder, data, tmp_path):
    lists = dict(lambda_1=[0.0, 0.5, 5.0], lambda_2=[0.0, 0.1, 0.3], base_lr=[3.0, 2.0, 1.0])
    settings = config(
        tiny_folder, data, tmp_path / "run", sequence=SequenceConfig(epochs=[1, 2, 4], **lists)
    )
    stages = [stage_config(settings, number) for number in range(3)]
    assert [s.adapter.olora.lambda_1 for s in stages] == lists["lambda_1"]
    assert [s.adapter.olora.lambda_2 for s in stages] == lists["lambda_2"]
    assert [s.lr.base_lr for s in stages] == lists["base_lr"]
    assert [s.stages[-1].epochs for s in stages] == [1, 2, 4]
    assert [s.task.train for s in stages] == [str(data / f"{n}.train.jsonl") for n in TASKS]
    assert [s.start_from for s in stages] == [None, stages[0].run, stages[1].run]
    with pytest.raises(ConfigError, match=r"sequence\.lambda_1 has 2 values for 3 tasks"):
        dataclasses.replace(settings, sequence=SequenceConfig(lambda_1=[1.0, 2.0]))


def test_an_unknown_task_is_named_before_anything_is_written(
    tiny_folder, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("weights were loaded"))
    settings = config(tiny_folder, data, tmp_path / "run", tasks=["colours", "size"])
    with pytest.raises(ConfigError, match=r"tasks: .*size\.test\.jsonl: no such data file"):
        train(settings)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="tasks names colours twice"):
        config(tiny_folder, data, tmp_path / "run", tasks=["colours", "colours"])
    fixed = dataclasses.replace(
        settings.task, train=str(data / "sizes.train.jsonl"), test=str(data / "sizes.test.jsonl")
    )
    with pytest.raises(ConfigError, match=r"write \{task\} where it belongs"):
        train(dataclasses.replace(settings, task=fixed))


def test_broken_data_of_a_later_task_is_found_first(tiny_folder, data, tmp_path):
    (tmp_path / "data").mkdir()
    for file in data.iterdir():
        (tmp_path / "data" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "data" / "tastes.train.jsonl").write_text('{"sentence": 1}\n')
    with pytest.raises(DataError, match=r"tastes.train.jsonl:1"):
        train(config(tiny_folder, tmp_path / "data", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["method", "rank", "scale"])
def test_another_method_cannot_continue(finished, tiny_folder, data, tmp_path, what):
    adapter = {
        "method": AdapterConfig(method="lora", rank=4, alpha=tiny.ALPHA),
        "rank": dataclasses.replace(tiny.ADAPTERS["olora"], rank=2),
        "scale": AdapterConfig(method="olora", rank=4, alpha=1.0),
    }[what]
    before = sequence.stage_path(finished.run, 0, TASKS[0])
    settings = config(
        tiny_folder,
        data,
        tmp_path / "run",
        adapter=adapter,
        tasks=TASKS[1:],
        start_from=str(before),
    )
    with pytest.raises(ConfigError, match=f"was trained with adapter {what}"):
        train(settings)
    assert not (tmp_path / "run" / "tasks").exists()


def test_another_base_cannot_continue(finished, data, tmp_path):
    other = tiny.save_tiny(tmp_path / "other", seed=5)
    before = sequence.stage_path(finished.run, 0, TASKS[0])
    settings = config(other, data, tmp_path / "run", tasks=TASKS[1:], start_from=str(before))
    with pytest.raises(BaseMismatch, match="sha256"):
        train(settings)


def test_a_run_without_super_adapter_cannot_be_continued(tiny_folder, data, tmp_path):
    settings = config(tiny_folder, data, tmp_path / "run", start_from=str(tmp_path / "nothing"))
    with pytest.raises(RunError, match="nothing does not exist"):
        train(settings)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_answers_do_not_depend_on_the_batch(tiny_folder, batch):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    prompts = ["a", "long prompt", "another", "b c", "a longer prompt still", "x"]
    asked = [Example(prompt, "") for prompt in prompts]
    alone = [answers(model, tokenizer, [one], new_tokens=5)[0] for one in asked]
    assert answers(model, tokenizer, asked, new_tokens=5, batch=batch) == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("World", "world", True),
        ("very  positive.", "Very positive", True),
        ("positive", "very positive", False),
        ("the world", "world", False),
        ("", "world", False),
    ],
)
def test_exact_match_ignores_case_punctuation_and_spacing(found, expected, same):
    assert same_text(found, expected) is same


def test_a_changed_sequence_is_refused_in_the_same_directory(finished, tiny_folder, data):
    before = snapshot(finished.run.path)
    settings = config(tiny_folder, data, finished.run.path, seed=1)
    with pytest.raises(RunError, match="holds another run"):
        train(settings)
    assert snapshot(finished.run.path) == before
