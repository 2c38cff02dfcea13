"""The recipes of the papers: they fit the models they name, and tiny versions of them run."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from elastic import __main__
from elastic.adapters import METHODS, check
from elastic.config import SearchConfig, TaskConfig, TrainConfig
from elastic.config.parsing import parse
from elastic.data import load_task
from elastic.errors import DataError
from elastic.run import Run
from elastic.spaces.declared import SearchSpace
from elastic.supernet.store import load_run
from elastic.training.sequence import stage_config
from tests.helpers import tiny

LLAMA = ("meta-llama/Llama-2-7b-hf", "huggyllama/llama-7b", "yahma/llama-7b-hf")
PARAMETERS = {
    "sorsa-llama2-7b-math-train": 319_844_352,
    "soslora-llama2-7b-math-train": 325_256_064,
    "prolora-llama2-7b-instructions-train": 19_992_064,
    "olora-t5-large-train": 2_359_296,
    "olora-llama-7b-train": 2 * 32 * 8 * (4096 + 4096),
    "lonas-llama-7b-math-train": 32 * 32 * (3 * 2 * 4096 + 3 * (4096 + 11008)),
    "lonas-llama-7b-commonsense-train": 32 * 32 * (3 * 2 * 4096 + 3 * (4096 + 11008)),
    "lonas-llama-13b-math-train": 40 * 32 * (3 * 2 * 5120 + 2 * (5120 + 13824)),
    "lonas-bloomz-7b-math-train": 30 * 32 * (4 * 4096 + 2 * 5 * 4096),
} | {
    f"lonas-bert-{task}-train": 12 * 8 * 2 * (768 + 768)
    for task in ("rte", "mrpc", "stsb", "cola", "sst2", "qnli", "qqp", "mnli")
}
"""Trained per task, as the papers count or the formulas of their methods give."""
KINDS = {"dbpedia": "TC", "amazon": "SC", "yahoo": "TC", "agnews": "TC"}


def architecture(path: str) -> torch.nn.Module:
    """The named model without memory."""
    with torch.device("meta"):
        if path in LLAMA:
            return LlamaForCausalLM(LlamaConfig())  # the defaults are those of LLaMA-7B
        if path == "yahma/llama-13b-hf":
            return LlamaForCausalLM(
                LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                            num_attention_heads=40)
            )  # fmt: skip
        if path == "bigscience/bloomz-7b1":
            return BloomForCausalLM(BloomConfig(hidden_size=4096, n_layer=30, n_head=32))
        if path == "google-bert/bert-base-uncased":
            return BertForSequenceClassification(BertConfig())  # the defaults are BERT-base's
        assert path == "google-t5/t5-large"
        return T5ForConditionalGeneration(
            T5Config(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16)
        )


def recipe(*names: str) -> TrainConfig:
    return parse(TrainConfig, [part for name in names for part in ("--config", name)])


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_binds_and_trains_as_many_parameters_as_published(name):
    config = recipe(name)
    model = architecture(config.model.path)
    bound = SearchSpace.load(config.space).bind(model, config.adapter.rank)
    check(config.adapter, model, bound)
    assert bound.size > 1
    method, count = METHODS[config.adapter.resolved_method], 0
    for site in bound.targets:
        weight = model.get_submodule(site).weight
        adapter = method(config.adapter, *weight.shape, device="meta")
        count += sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert count == PARAMETERS[name]


def test_the_small_setting_of_prolora():
    config = parse(TrainConfig, [
        "--config", "prolora-llama2-7b-instructions-train", "--adapter.rank", "8",
        "--adapter.prolora", "{unshared_rank: 1, share_in: 7, share_out: 7}",
    ])  # fmt: skip
    model = architecture(config.model.path)
    bound = SearchSpace.load(config.space).bind(model, 8)
    sizes = [model.get_submodule(site).weight.shape for site in bound.targets]
    adapters = (METHODS["prolora"](config.adapter, *size, device="meta") for size in sizes)
    assert sum(p.numel() for a in adapters for p in a.parameters()) == 4_999_520


@pytest.mark.parametrize(
    "name, groups, widths",
    [
        ("lonas-llama-7b-math-train", 96, (11008, 9632, 8256, 6880, 5504)),
        ("lonas-llama-13b-math-train", 120, (13824, 12096, 10368, 8640, 6912)),
        ("lonas-bloomz-7b-math-train", 90, (16384, 14336, 12288, 10240, 8192)),
    ],
)
def test_lonas_spaces_are_the_published_ones(name, groups, widths):
    config = recipe(name)
    bound = SearchSpace.load(config.space).bind(architecture(config.model.path), 32)
    assert len(bound.groups) == groups
    assert {g.choices for g in bound if g.dim == "width"} == {widths}
    assert {g.choices for g in bound if g.dim == "rank"} == {(32, 28)}
    assert (config.adapter.alpha, config.resolved_order) == (64, "none")


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


def test_lonas_space_of_bert_is_the_published_one():
    config = recipe("lonas-bert-rte-train")
    bound = SearchSpace.load(config.space).bind(architecture(config.model.path), 8)
    assert len(bound.groups) == 36
    assert {group.choices for group in bound if group.dim == "rank"} == {(8, 4, 2)}
    heads = [group.choices for group in bound if group.dim == "heads"]
    assert [most for most, *_ in heads] == [12] * 12
    assert [fewest for *_, fewest in heads] == [6, 5, 4, 8, 8, 11, 9, 9, 10, 3, 3, 5]
    widths = [group.choices for group in bound if group.dim == "width"]
    assert widths[0] == (3072, 2634, 216) and widths[-1] == (3072, 1940, 150)
    searched = parse(SearchConfig, ["--config", "lonas-glue-search"])
    assert (searched.trials, searched.population, searched.costs) == (1000, 40, ["macs"])


def test_the_published_search_picks_the_fewest_operations():
    config = parse(SearchConfig, ["--config", "lonas-search"])
    assert config.costs == ["macs"] and config.budget.limits() == {"min_accuracy": 0.44}


@pytest.mark.parametrize("base", ["olora-t5-large-train", "olora-llama-7b-train"])
@pytest.mark.parametrize("order", range(1, 7))
def test_orders_of_tasks_layer_over_a_model(base, order):
    config = recipe(base, f"olora-order{order}-train")
    assert config.model.path == recipe(base).model.path
    assert len(config.tasks) == len(set(config.tasks)) == (4 if order < 4 else 15)
    last = stage_config(config, len(config.tasks) - 1)
    expected = (5.0, 0.3) if order == 6 else (0.5, 0.0)
    assert (last.adapter.olora.lambda_1, last.adapter.olora.lambda_2) == expected
    assert last.task.folder == f"data/CL_Benchmark/*/{config.tasks[-1]}"
    if order > 3:
        assert set(config.tasks) == set(recipe("olora-order4-train").tasks)


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


@pytest.mark.parametrize("name", [n for n in PARAMETERS if not n.startswith(("olora", "lonas"))])
def test_a_tiny_version_trains(name, rows, tiny_folder, tmp_path, capsys):
    run = tmp_path / "run"
    command = [
        "train", str(run), "--config", name, "--model.path", str(tiny_folder),
        "--model.dtype", "float32", "--model.device", "cpu", "--adapter.rank", "16",
        "--task.train", str(rows), "--task.test", str(rows.with_name("test.jsonl")),
        "--task.train_examples", "8", "--task.validation_examples", "2",
        "--accumulation", "2", "--batch_size", "2",
        "--stages", "[{epochs: 1}, {train_dims: [rank, width], epochs: 1}]",
    ]  # fmt: skip
    assert __main__.main(command) == 0, capsys.readouterr().err
    net = load_run(Run(run))[2]
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
