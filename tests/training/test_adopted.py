"""A LoRA that was trained elsewhere becomes a super-adapter, without a step of training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from elastic.config import AdapterConfig, CompensationConfig, TrainConfig
from elastic.config.parsing import parse
from elastic.errors import ConfigError, ElasticError, RunError
from elastic.exporting.command import export
from elastic.files import read_json
from elastic.run import Run
from elastic.searching.study import search
from elastic.supernet.compact import compact
from elastic.supernet.store import MOMENTS, load_run
from elastic.training.adopted import sorted_ranks
from elastic.training.command import train
from tests.helpers import exports, searches, tiny
from tests.helpers.classification import classifier_config
from tests.helpers.tiny_runs import train_config

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def saved_adapter(base, folder, config=None, **settings):
    """A PEFT adapter on the tiny model, with nothing left at zero."""
    config = config or LoraConfig(
        **dict(r=4, lora_alpha=12, target_modules=EVERY, task_type="CAUSAL_LM") | settings
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def settings(base, folder, taken):
    config = train_config(base, folder / "run", adapter=AdapterConfig(taken_from=str(taken)))
    return replace(config, task=searches.choices_task(folder))


def of_peft(base, folder) -> torch.Tensor:
    """What stock PEFT computes, unmerged."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        return model.eval()(input_ids=tiny.tokens()).logits


@pytest.fixture(scope="module")
def taken(tiny_folder, tmp_path_factory):
    """(the adapter's folder, the run)."""
    folder = tmp_path_factory.mktemp("taken")
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"up_proj": 3}}
    adapter = saved_adapter(tiny_folder, folder / "adapter", **patterns)
    return adapter, train(settings(tiny_folder, folder, adapter))


def test_at_full_size_it_is_the_adapter(tiny_folder, taken):
    adapter, run = taken
    _, _, net = load_run(run)
    expected = of_peft(tiny_folder, adapter)
    with net.active(net.space.maximal()) as model:
        found = tiny.logits(model, tiny.tokens())
    atol = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    assert run.config().adapter.rank == 4
    about = read_json(run.super_adapter / "about.json")
    assert about["steps"] == 0 and about["taken_from"] == str(adapter)


def test_it_is_searched_and_exported_like_any_other(taken, fake_latency):
    _, run = taken
    assert (run.super_adapter / MOMENTS).is_file()
    search(searches.config(run))
    report = export(exports.config(run, compensation=CompensationConfig(degrees=[1.0])))
    assert report.proved["hf"].exact.greedy_tokens_equal


def test_one_of_its_sub_adapters_is_trained_on(taken, tmp_path):
    _, run = taken
    flags = ["--from", str(run.path), "--run", str(tmp_path / "on"), "--sub_adapter", "minimal"]
    on = train(parse(TrainConfig, [*flags, "--max_steps", "1"]))
    assert on.config().adapter.taken_from is None and on.space().sections == run.space().sections
    assert read_json(on.super_adapter / "about.json")["steps"] == 1


def test_running_it_again_finds_it_finished(taken, capsys):
    _, run = taken
    before = (run.super_adapter / "factors.safetensors").stat().st_mtime_ns
    train(run.config())
    assert "already trained" in capsys.readouterr().err
    assert (run.super_adapter / "factors.safetensors").stat().st_mtime_ns == before


def test_none_is_the_base_model(tiny_folder, tmp_path):
    run = train(settings(tiny_folder, tmp_path, "none"))
    _, _, net = load_run(run)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        expected = base(input_ids=tiny.tokens()).logits
    with net.active(net.space.maximal()) as model:
        torch.testing.assert_close(tiny.logits(model, tiny.tokens()), expected)
    assert not torch.equal(tiny.logits(compact(net, net.space.minimal()), tiny.tokens()), expected)


def test_the_leading_ranks_are_the_best_approximation():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(5, 12, generator=generator), torch.randn(9, 5, generator=generator)
    found_A, found_B = sorted_ranks(A, B)
    torch.testing.assert_close(found_B @ found_A, B @ A, rtol=0, atol=1e-5)
    values = torch.linalg.svdvals(B @ A)
    for rank in range(1, 5):
        error = torch.linalg.matrix_norm(B @ A - found_B[:, :rank] @ found_A[:rank])
        torch.testing.assert_close(error, values[rank:].square().sum().sqrt())


def spoilt(name):
    def spoil(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        first = next(iter(tensors))
        if name == "nan":
            tensors[first].fill_(torch.nan)
        else:
            tensors[first.replace("layers.0", "layers.7")] = tensors.pop(first)
        save_file(tensors, folder / "adapter_model.safetensors")

    return spoil


@pytest.mark.parametrize(
    "config, spoil, message",
    [
        (dict(use_dora=True), None, "use_dora"),
        (dict(bias="all"), None, "bias"),
        (dict(modules_to_save=["embed_tokens"]), None, "modules_to_save"),
        (dict(target_modules=[*EVERY, "lm_head"]), None, "lm_head lies in no block"),
        (dict(target_modules=[*EVERY, "embed_tokens"]), None, "adapts embeddings"),
        (dict(init_lora_weights="pissa"), None, "by pissa, so it belongs to a changed base"),
        ({}, lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"{"), "cannot be"),
        ({}, lambda folder: (folder / "adapter_config.json").write_text("[]"), "a JSON object"),
        (IA3Config(target_modules=EVERY, feedforward_modules=[]), None, "this is IA3"),
        ({}, lambda folder: (folder / "adapter_model.safetensors").unlink(), "missing"),
        ({}, spoilt("nan"), "NaN"),
        ({}, spoilt("name"), "belongs to no layer"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_over_is_refused(tiny_folder, tmp_path, config, spoil, message):
    given = {"config": config} if isinstance(config, IA3Config) else config
    adapter = saved_adapter(tiny_folder, tmp_path / "adapter", **given)
    if spoil:
        spoil(adapter)
    with pytest.raises(ElasticError, match=message):
        train(settings(tiny_folder, tmp_path, adapter))
    assert not Run(tmp_path / "run").super_adapter.exists()


def test_refused_before_weights_load(tiny_folder, tmp_path, forbid_weights):
    with pytest.raises(RunError, match=r"adapter\.from"):
        train(settings(tiny_folder, tmp_path, tmp_path))


def test_another_base_is_refused(tiny_folder, tmp_path):
    adapter = saved_adapter(tiny_folder, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"base_digest": "sha256:other"})
    with pytest.raises(RunError, match="sha256:other"):
        train(settings(tiny_folder, tmp_path, adapter))


def test_the_command_line_calls_it_from():
    for arguments in (["--adapter.from", "some/folder"], ["--adapter.from=some/folder"]):
        assert parse(TrainConfig, arguments).adapter.taken_from == "some/folder"
    with pytest.raises(ConfigError, match="nothing is trained"):
        parse(TrainConfig, ["--adapter.from", "none", "--dry_run"])
    with pytest.raises(ConfigError, match="takes over a LoRA"):
        parse(TrainConfig, ["--adapter.from", "none", "--adapter.method", "sorsa"])


def test_a_head_is_taken_over_too(tmp_path):
    trained = classifier_config(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        trained.model.path, num_labels=2, ignore_mismatched_sizes=True
    )
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (p for p in wrapped.parameters() if p.requires_grad):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(tmp_path / "adapter")
    adapter = AdapterConfig(taken_from=str(tmp_path / "adapter"))
    run = train(replace(trained, adapter=adapter, run=str(tmp_path / "taken")))
    _, _, net = load_run(run)
    with torch.no_grad():
        expected = wrapped.eval()(input_ids=tiny.tokens()).logits
        with net.active(net.space.maximal()) as ours:
            found = ours(input_ids=tiny.tokens()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
