"""Every recipe of a paper fits the model that it names: on the meta device, at published sizes."""

import functools

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from elastic.adapters import METHODS, check
from elastic.config import TrainConfig
from elastic.config.parsing import parse
from elastic.spaces.declared import SearchSpace
from elastic.training.schedule import Schedule, examples_per_step
from elastic.training.sequence import stage_config
from tests.helpers.papers import RECIPES, recipe

SIZES = {
    LlamaForCausalLM: [
        (LlamaConfig, ("meta-llama/Llama-2-7b-hf", "huggyllama/llama-7b", "yahma/llama-7b-hf"),
         {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
          "num_hidden_layers": 32, "num_attention_heads": 32}),
        (LlamaConfig, ("meta-llama/Llama-2-13b-hf", "yahma/llama-13b-hf"),
         {"vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824,
          "num_hidden_layers": 40, "num_attention_heads": 40}),
        (LlamaConfig, ("meta-llama/Meta-Llama-3-8B",),
         {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
          "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}),
    ],
    MistralForCausalLM: [
        (MistralConfig, ("mistralai/Mistral-7B-v0.1",),
         {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
          "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}),
    ],
    GemmaForCausalLM: [
        (GemmaConfig, ("google/gemma-7b",),
         {"vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576,
          "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16,
          "head_dim": 256}),
    ],
    RwkvForCausalLM: [
        (RwkvConfig, ("RWKV/rwkv-4-7b-pile",),
         {"vocab_size": 50277, "hidden_size": 4096, "attention_hidden_size": 4096,
          "intermediate_size": 16384, "num_hidden_layers": 32}),
    ],
    BloomForCausalLM: [
        (BloomConfig, ("bigscience/bloomz-7b1",),
         {"vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32}),
    ],
    T5ForConditionalGeneration: [
        (T5Config, ("google-t5/t5-large",),
         {"vocab_size": 32128, "d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24,
          "num_heads": 16}),
    ],
    BertForSequenceClassification: [
        (BertConfig, ("google-bert/bert-base-uncased",), {}),  # the defaults are BERT-base's
    ],
}  # fmt: skip
BASES = {
    path: (model, config, sizes)
    for model, all_sizes in SIZES.items()
    for config, paths, sizes in all_sizes
    for path in paths
}
SHAPES = {  # billions of parameters, as the papers and the models' cards have them
    "meta-llama/Llama-2-7b-hf": 6.738, "meta-llama/Llama-2-13b-hf": 13.016,
    "meta-llama/Meta-Llama-3-8B": 8.030, "mistralai/Mistral-7B-v0.1": 7.242,
    "google/gemma-7b": 8.538, "RWKV/rwkv-4-7b-pile": 7.393, "bigscience/bloomz-7b1": 7.069,
    "google-t5/t5-large": 0.738,
}  # fmt: skip

PARAMETERS = {
    "sorsa-llama2-7b-math-train": 319_844_352,
    "sorsa-mistral-7b-math-train": 167_786_496,
    "sorsa-gemma-7b-math-train": 200_028_416,
    "sorsa-rwkv4-7b-math-train": 32 * 64 * (5 * (2 * 4096 + 1) + 2 * (4096 + 16384 + 1)),
    "soslora-llama2-7b-math-train": 325_256_064,
    "soslora-llama3-8b-math-train": 32
    * (
        128 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
        + 4 * (3 * 4096 + 2 * 1024 + 2 * 14336 + 7)
    ),
    "prolora-llama2-7b-instructions-train": 19_992_064,
    "prolora-llama2-13b-instructions-train": 40 * 195_631,
    "olora-t5-large-train": 2_359_296,
    "olora-llama-7b-train": 2 * 32 * 8 * (4096 + 4096),
    "olora-llama2-7b-train": 2 * 32 * 8 * (4096 + 4096),
    "lonas-llama-7b-math-train": 32 * 32 * (3 * 2 * 4096 + 3 * (4096 + 11008)),
    "lonas-llama-7b-commonsense-train": 32 * 32 * (3 * 2 * 4096 + 3 * (4096 + 11008)),
    "lonas-llama-13b-math-train": 40 * 32 * (3 * 2 * 5120 + 2 * (5120 + 13824)),
    "lonas-bloomz-7b-math-train": 30 * 32 * (4 * 4096 + 2 * 5 * 4096),
} | {
    f"lonas-bert-{task}-train": 12 * 8 * 2 * (768 + 768)
    for task in ("rte", "mrpc", "stsb", "cola", "sst2", "qnli", "qqp", "mnli")
}
"""Trained per task, as the papers count or the formulas of their methods give."""
PRINTED = {  # millions, in the papers' tables
    "sorsa-llama2-7b-math-train": "320",
    "sorsa-mistral-7b-math-train": "168",
    "sorsa-gemma-7b-math-train": "200",
    "prolora-llama2-7b-instructions-train": "19.99",
}


@functools.cache
def architecture(path: str) -> torch.nn.Module:
    """The named model without memory; read, never changed."""
    model, config, sizes = BASES[path]
    with torch.device("meta"):
        return model(config(**sizes))


def trained(config: TrainConfig) -> int:
    """Parameters of the adapter of this recipe on its model."""
    model = architecture(config.model.path)
    bound = SearchSpace.load(config.space).bind(model, config.adapter.rank)
    check(config.adapter, model, bound)
    assert bound.size > 1
    method, count = METHODS[config.adapter.resolved_method], 0
    for site in bound.targets:
        adapter = method(config.adapter, *model.get_submodule(site).weight.shape, device="meta")
        count += sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    return count


@pytest.mark.parametrize("path", SHAPES)
def test_a_base_has_its_published_size(path):
    counted = sum(p.numel() for p in architecture(path).parameters())
    assert counted / 1e9 == pytest.approx(SHAPES[path], abs=6e-4)


def test_every_recipe_of_a_paper_is_here():
    """Those that name a model; the others are layers over one."""
    named = {name for name in RECIPES if recipe(name).model != TrainConfig().model}
    assert named == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_binds_and_trains_as_many_parameters_as_published(name):
    count = trained(recipe(name))
    assert count == PARAMETERS[name]
    if printed := PRINTED.get(name):
        assert f"{count / 1e6:.{2 if '.' in printed else 0}f}" == printed


def test_the_small_setting_of_prolora():
    small = "{unshared_rank: 1, share_in: 7, share_out: 7}"
    flags = ["--adapter.rank", "8", "--adapter.prolora", small]
    name = "prolora-llama2-7b-instructions-train"
    assert trained(parse(TrainConfig, ["--config", name, *flags])) == 4_999_520


def test_the_paper_of_prolora_counts_32_blocks_of_13b():
    """Of the 40 that there are: its 6.26 million are ours for 32."""
    each, rest = divmod(PARAMETERS["prolora-llama2-13b-instructions-train"], 40)
    assert rest == 0 and f"{32 * each / 1e6:.2f}" == "6.26"


def test_rwkv_6_has_the_parameters_that_sorsas_table_prints():
    """Rank 64 on the eight linear layers of a block: which decides the rank for RWKV-4."""
    square, mixed = 4096 + 4096 + 1, 4096 + 14336 + 1
    assert f"{32 * 64 * (6 * square + 2 * mixed) / 1e6:.0f}" == "176"


LENGTHS = {  # steps, and the highest learning rate
    "sorsa": (782, 3e-5), "prolora": (10_000, 2e-4), "soslora": (3_125, 2e-5),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_schedule_resolves(name):
    """As long as published, up to the rate that is named and, but for O-LoRA's, down from there."""
    config = recipe(name)
    if config.tasks:
        config = stage_config(config, 0)
    schedule = Schedule.of(config, config.task.train_examples)
    rates = [schedule.learning_rate(step) for step in range(0, schedule.steps, 5)]
    highest = max(rates)
    method = name.partition("-")[0]
    if method in LENGTHS:
        steps, rate = LENGTHS[method]
        assert schedule.steps == steps and highest == pytest.approx(rate, rel=0.01)
        assert 0 < rates[0] < highest and rates[-1] < 0.01 * highest
        assert examples_per_step(config) == {"sorsa": 128, "prolora": 16, "soslora": 32}[method]
    elif method == "olora":
        assert set(rates) == {config.lr.base_lr} and examples_per_step(config) == 64
    else:
        assert highest == pytest.approx(config.stages[0].init_lr) and rates[-1] < rates[0]


@pytest.mark.parametrize("base", [n for n in PARAMETERS if n.startswith(("sorsa", "prolora"))])
def test_other_data_layer_over_a_model(base):
    """Settings of the data alone change, but for the learning rate of PRoLoRA's code."""
    method, plain = base.partition("-")[0], recipe(base)
    layers = ("code",) if method == "sorsa" else ("superni", "flan", "cot", "code")
    files = {plain.task.train}
    for layer in layers:
        layered = recipe(base, f"{method}-{layer}-train")
        files.add(layered.task.train)
        assert (layered.model, layered.adapter) == (plain.model, plain.adapter)
        assert layered.task.prompt == plain.task.prompt
        slow = method == "prolora" and layer == "code"
        assert layered.lr.base_lr == (5e-5 if slow else plain.lr.base_lr)
        assert (layered.lr.shape, layered.lr.warmup_epochs) == (plain.lr.shape, 0.03)
    assert len(files) == len(layers) + 1


@pytest.mark.parametrize("base", ["olora-t5-large-train", "olora-llama-7b-train",
                                  "olora-llama2-7b-train"])  # fmt: skip
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
