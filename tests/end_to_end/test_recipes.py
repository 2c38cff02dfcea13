"""The recipes of the papers: they train as published, and tiny versions of them run."""

import json
from pathlib import Path

import pytest
import torch

from elastic import __main__
from elastic.config import SearchConfig, TaskConfig
from elastic.config.parsing import parse
from elastic.data import load_task
from elastic.errors import DataError
from elastic.models.quantised import QuantisedLinear
from elastic.run import Run
from elastic.supernet.store import load_run
from tests.helpers import tiny
from tests.helpers.families import model_of
from tests.helpers.papers import recipe

KINDS = {"dbpedia": "TC", "amazon": "SC", "yahoo": "TC", "agnews": "TC"}


PUBLISHED_GLUE = {  # epochs, learning rate, batch, dropout: LoNAS's commands and NNCF files
    "cola": (80, 3e-4, 64, 0.05),
    "mnli": (40, 4e-4, 64, 0.1),
    "mrpc": (35, 5e-4, 32, 0.1),
    "qnli": (80, 4e-4, 64, 0.1),
    "qqp": (60, 3e-4, 64, 0.1),
    "rte": (80, 3e-4, 32, 0.1),
    "sst2": (60, 3e-4, 64, 0.1),
    "stsb": (60, 5e-4, 64, 0.1),
}


@pytest.mark.parametrize("task", PUBLISHED_GLUE)
def test_lonas_on_glue_trains_as_published(task):
    config = recipe(f"lonas-bert-{task}-train")
    [stage] = config.stages
    trained = (stage.epochs, stage.init_lr, config.batch_size, config.adapter.dropout)
    assert trained == PUBLISHED_GLUE[task]
    assert (config.weight_decay, config.accumulation, config.draw_for) == (0.1, 1, "micro_batch")


@pytest.mark.parametrize("model", ["llama-7b", "llama-13b", "bloomz-7b"])
def test_lonas_draws_four_sub_adapters_in_a_step(model):
    config = recipe(f"lonas-{model}-math-train")
    assert (config.batch_size, config.accumulation, config.draw_for) == (4, 4, "micro_batch")


def test_the_published_searches():
    searched = parse(SearchConfig, ["--config", "lonas-glue-search"])
    assert (searched.trials, searched.population, searched.costs) == (1000, 40, ["macs"])


def test_the_published_search_picks_the_fewest_operations():
    config = parse(SearchConfig, ["--config", "lonas-search"])
    assert config.costs == ["macs"] and config.budget.limits() == {"min_accuracy": 0.44}


# Tiny versions


@pytest.fixture
def rows(tmp_path) -> Path:
    """A file with every field that a recipe reads."""
    file = tmp_path / "rows.jsonl"
    lines = [
        {"query": f"{i} and {i}?", "response": str(2 * i), "instruction": f"say {i}", "output": "a"}
        for i in range(12)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({key: "7" for key in lines[0]}) + "\n")
    return file


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("sorsa-llama2-7b-math-train", []),
        pytest.param("sorsa-rwkv4-7b-math-train", [], marks=pytest.mark.slow),
        ("soslora-llama2-7b-math-train", []),
        ("soslora-llama3-8b-math-train", ["--model.quantise", "nf4"]),
        ("prolora-llama2-7b-instructions-train", ["--config", "prolora-superni-train"]),  # nf4
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tiny_version_trains(name, flags, rows, tiny_folder, tmp_path, capsys):
    if "rwkv" in name:
        tiny_folder = tmp_path / "rwkv"
        model_of("rwkv", torch.float32).save_pretrained(tiny_folder)
        tiny.tokenizer().save_pretrained(tiny_folder)
    run = tmp_path / "run"
    command = [
        "train", str(run), "--config", name, *flags, "--model.path", str(tiny_folder),
        "--model.dtype", "float32", "--model.device", "cpu", "--adapter.rank", "16",
        "--task.train", str(rows), "--task.test", str(rows.with_name("test.jsonl")),
        "--task.train_examples", "8", "--task.validation_examples", "2",
        "--accumulation", "2", "--batch_size", "2",
        "--stages", "[{epochs: 1}, {train_dims: [rank, width], epochs: 1}]",
    ]  # fmt: skip
    assert __main__.main(command) == 0, capsys.readouterr().err
    _, base, net = load_run(Run(run))
    quantised = any(isinstance(layer, QuantisedLinear) for layer in base.model.modules())
    assert quantised == ("nf4" in flags or name.startswith("prolora"))
    moved = [a for _, a in net.adapters() if any(d.abs().max() > 0 for d in a.factors(16)[1:])]
    assert len(moved) == len(net.space.targets)


def benchmark(folder: Path) -> Path:
    """The published layout with eight rows per split."""
    for name, kind in KINDS.items():
        place = folder / kind / name
        place.mkdir(parents=True)
        labels = [f"{name[:2]}{i}" for i in range(2)]
        (place / "labels.json").write_text(json.dumps(labels))
        for split in ("train", "dev", "test"):
            lines = [{"sentence": f"{split} {i} of {name}", "label": labels[i % 2]}
                     for i in range(8)]  # fmt: skip
            (place / f"{split}.json").write_text(json.dumps(lines))
    return folder


@pytest.mark.parametrize("base", ["olora-t5-large-train", "olora-llama-7b-train"])
def test_a_tiny_sequence_runs(base, tiny_folder, tmp_path, capsys):
    folder = tiny.save_t5(tmp_path / "t5") if "t5" in base else tiny_folder
    run = tmp_path / "run"
    command = [
        "train", str(run), "--config", base, "--config", "olora-order1-train",
        "--model.path", str(folder), "--model.dtype", "float32", "--model.device", "cpu",
        "--task.folder", str(benchmark(tmp_path / "data") / "*" / "{task}"),
        "--batch_size", "4", "--accumulation", "1", "--sequence.new_tokens", "3",
    ]  # fmt: skip
    assert __main__.main(command) == 0, capsys.readouterr().err
    found = json.loads((run / "continual.json").read_text())
    assert found["tasks"] == list(KINDS) and found["n"] == [8] * 4
    assert found["name_in_prompt"] is True
    net = load_run(Run(run / "tasks" / "04-agnews"))[2]
    for _, adapter in net.adapters():
        assert len(adapter.A_old) == 3 * 8
        assert adapter.B_old.abs().sum() > 0 and adapter.B.abs().sum() > 0


def test_prompts_of_the_published_layout(tmp_path):
    folder = benchmark(tmp_path / "data")
    config = TaskConfig(name="instructions", folder=str(folder / "*" / "amazon"))
    task = load_task(config, 0)
    prompts = {example.prompt for example in task.test}
    assert (
        "Task:SC\nDataset:amazon\nWhich sentiment does this text express? Choose one of the "
        "options.\nOption: am0, am1 \ntest 0 of amazon\nAnswer:"
    ) in prompts
    anonymous = load_task(TaskConfig(**{**vars(config), "name_data": False}), 0)
    assert all("amazon\n" not in e.prompt.split("Option")[0] for e in anonymous.test)
    assert len(task.train) == len(task.validation) == len(task.test) == 8
    (folder / "SC" / "amazon" / "dev.json").unlink()
    held_out = load_task(config, 0)
    assert len(held_out.train) == 4 and len(held_out.validation) == 4
    assert not {e.prompt for e in held_out.train} & {e.prompt for e in held_out.validation}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: (f / "labels.json").write_text("{}"), r"labels\.json: expected a list"),
        (lambda f: (f / "train.json").write_text("[{"), r"train\.json:1: broken JSON"),
        (lambda f: (f / "test.json").write_text('[{"label": 1}]'), "row 0 has no field 'sentence'"),
        (
            lambda f: (f / "test.json").write_text('[{"sentence": "x", "label": null}]'),
            "row 0 has no field 'label'",
        ),
        (
            lambda f: (f / "test.json").write_text('[{"sentence": "x", "label": ["a", "b"]}]'),
            r"test\.json: row 0: field 'label' is \['a', 'b'\]; give one text",
        ),
        (lambda f: (f / "test.json").unlink(), r"test\.json: no such data file"),
        (lambda f: (f / "test.json").write_text("[]"), "the test split is empty"),
        (lambda f: f.parent.rename(f.parents[1] / "XX"), "its parent names the type of task"),
        (lambda f: f.rename(f.parent / "other"), "no such folder"),
    ],
)
def test_a_broken_folder_is_named(tmp_path, change, match):
    folder = benchmark(tmp_path / "data") / "SC" / "amazon"
    change(folder)
    config = TaskConfig(name="instructions", folder=str(tmp_path / "data" / "*" / "amazon"))
    with pytest.raises(DataError, match=match):
        load_task(config, 0)
