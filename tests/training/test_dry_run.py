"""A dry run says what training will need: what it counts on tensors without data is what real ones
take, and it leaves nothing behind."""

import gc
import json
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import pytest
from torch.profiler import ProfilerActivity, profile
from transformers import BloomConfig, LlamaConfig

from elastic.__main__ import main
from elastic.config import ModelConfig, StageConfig, TaskConfig, TrainConfig
from elastic.errors import ConfigError, DataError
from elastic.models import loading
from elastic.training import dry_run as dry
from elastic.training import estimate, one_task
from elastic.training.command import train
from tests.helpers import tiny
from tests.helpers.flops import Flops
from tests.helpers.tiny_runs import snapshot, space_file, train_config

R = 32


def dry_run(capsys, *arguments: str) -> tuple[str, dict]:
    """What `elastic train --dry_run` prints, and its last line as JSON."""
    assert main(["train", "--dry_run", *arguments]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


# Models nobody has here

LLAMA_7B = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                num_attention_heads=32, vocab_size=32000)  # fmt: skip


def llama_expected(hidden_size, intermediate_size, num_hidden_layers, vocab_size, **_):
    h, m, layers = hidden_size, intermediate_size, num_hidden_layers
    trained = layers * R * (3 * (h + h) + 3 * (h + m))  # q, k, v; gate, up, down
    macs = layers * (4 * h * h + 3 * h * m) + vocab_size * h
    cut = layers * 3 * h * (m - m // 2)
    return trained, macs, cut


def bloom_expected(h=4096, layers=30, vocabulary=250_880):
    trained = layers * R * ((h + 3 * h) + (h + 4 * h) + (4 * h + h))
    macs = layers * (4 * h * h + 8 * h * h) + vocabulary * h
    return trained, macs, layers * (2 * h * 2 * h + 2 * h)  # half of the width, with its biases


BIG = {
    "llama-7b": (LlamaConfig(**LLAMA_7B), "llama", 6_738_415_616, llama_expected(**LLAMA_7B)),
    "bloomz-7b": (
        BloomConfig(hidden_size=4096, n_layer=30, n_head=32, vocab_size=250_880),
        "bloom",
        7_069_016_064,
        bloom_expected(),
    ),
}


@pytest.mark.parametrize("name", ["llama-7b", pytest.param("bloomz-7b", marks=pytest.mark.slow)])
def test_models_of_billions_are_counted_from_config_json_alone(name, tmp_path, capsys):
    architecture, space, parameters, (trained, macs, cut) = BIG[name]
    architecture.save_pretrained(tmp_path / "base")
    assert [file.name for file in (tmp_path / "base").iterdir()] == ["config.json"]
    before = snapshot(tmp_path)
    text, found = dry_run(
        capsys, "--run", str(tmp_path / "run"), "--model.path", str(tmp_path / "base"),
        "--space", space, "--model.dtype", "bfloat16", "--model.device", "cpu",
        "--batch_size", "4", "--accumulation", "8", "--ranks", "elastic",
    )  # fmt: skip
    assert snapshot(tmp_path) == before
    assert found["parameters"] == found["costs"]["maximal"]["params"] == parameters
    assert found["trained"] == found["trained_by"]["lora"] == trained
    assert found["costs"]["maximal"]["macs"] == macs
    assert found["costs"]["minimal"]["params"] == parameters - cut
    assert [len(row["choices"]) for row in found["space"]] == [3, 5, 3]
    (blocks,) = {row["groups"] for row in found["space"]}
    assert found["sub_adapters"] == str((3 * 5 * 3) ** blocks)
    memory = found["memory"]
    assert 2 * parameters <= memory["base"] < 2 * parameters + 1024  # and a few small buffers
    assert memory["factors"] == memory["gradients"] == memory["moments"] / 2 == 4 * trained
    assert found["batch"]["length"] == 512 and "has no tokenizer" in found["batch"]["assumed"]
    assert "assumed, since" in text and f"{parameters:,}" in text
    # At least the base's own products, forward and for the gradient of the input; the head works
    # on the answer alone and a first layer's input has no gradient.
    compute = found["compute"]
    assert 3.4 * macs * 4 * 512 < compute["maximal"] < 6 * macs * 4 * 512
    assert compute["step"] == [8 * compute["minimal"], 8 * compute["maximal"]]
    assert compute["minimal"] < compute["maximal"]
    assert memory["total"] == sum(size for key, size in memory.items() if key != "total")


# A whole run


def rows_file(folder: Path, count: int, length: int = 18) -> TaskConfig:
    """A task of sequences of `length` + 4 tokens: <bos>, prompt, space, answer, <eos>."""
    lines = [{"prompt": f"{number:0{length}d}", "answer": "7"} for number in range(count + 2)]
    files = {"train": lines[:count], "validation": lines[count:-1], "test": lines[-1:]}
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return TaskConfig(name="jsonl", **{name: str(folder / f"{name}.jsonl") for name in files})


def shaped(folder: Path, run: Path, **overrides) -> TrainConfig:
    """A run of equal batches: 16 sequences in 2 steps an epoch, channels as they come, and nothing
    but its steps."""
    base = tiny.save_tiny(folder / "base", hidden_size=64, intermediate_size=256, head_dim=16)
    settings = dict(
        task=rows_file(folder, 16), batch_size=4, accumulation=2, order="none",
        compensation_examples=0,
    )  # fmt: skip
    return train_config(base, run, **(settings | overrides))


def test_a_real_run_takes_the_operations_that_were_said(tmp_path, monkeypatch):
    config = shaped(tmp_path, tmp_path / "run", stages=[StageConfig(epochs=2)])
    found = train(replace(config, dry_run=True))
    assert found.batch == estimate.Batch(sequences=4, length=24, answer=3)
    assert found.plan == estimate.Plan(tasks=1, examples=16, stages=1, steps=4)
    assert found.compute.step == (2 * found.compute.maximal,) * 2
    # Its counter would count what is tried on tensors without data.
    monkeypatch.setattr(one_task, "require_fits", lambda *_: None)
    with Flops() as flops:
        train(config)
    assert found.compute.run == (flops.get_total_flops(),) * 2


@pytest.mark.parametrize(
    ("sampling", "distill"), [("stratified", 0.5), ("sandwich", 0.5), ("lonas", 0.0)]
)
def test_a_real_run_stays_between_the_bounds(tmp_path, sampling, distill):
    stages = [StageConfig(), StageConfig(train_dims=["rank", "width"], epochs=2)]
    config = shaped(tmp_path, tmp_path / "run", sampling=sampling, distill=distill, stages=stages,
                    space=space_file(tmp_path))  # fmt: skip
    found = train(replace(config, dry_run=True))
    low, high = found.compute.run
    assert low < high
    with Flops() as flops:
        train(config)
    assert low <= flops.get_total_flops() <= high
    largest, smallest = 2 * found.compute.maximal, 2 * found.compute.minimal
    if sampling == "sandwich":
        assert found.compute.step == (largest + 2 * smallest, 2 * largest + smallest)
        assert low == 2 * largest + 4 * found.compute.step[0]
    elif not distill:
        assert found.compute.step == (smallest, largest)


def peak_of_training(config: TrainConfig, folder: Path) -> int:
    """The most bytes allocated at once by `elastic train`, as torch's profiler saw them; the base,
    whose file is mapped into memory, is not among them."""
    gc.collect()  # nothing of another test is freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        one_task.train_one(config)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    memory = [e["args"] for e in sorted(events, key=itemgetter("ts")) if e["name"] == "[memory]"]
    before = memory[0]["Total Allocated"] - memory[0]["Bytes"]  # what an earlier profile left
    return max(each["Total Allocated"] for each in memory) - before


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_memory_is_what_a_real_run_allocates(tmp_path, distill):
    stages = [StageConfig(epochs=2), *[StageConfig(train_dims=["rank", "width"])] * bool(distill)]
    config = shaped(tmp_path, tmp_path / "run", distill=distill, batch_size=8, stages=stages)
    memory = train(replace(config, dry_run=True)).memory
    measured = peak_of_training(config, tmp_path) + memory.base
    if distill:  # of a sub-adapter as large as the maximal one, which is seldom drawn
        assert 0.8 * memory.total < measured <= memory.total
    else:  # the Trainer keeps the batch and a few scalars
        assert measured == pytest.approx(memory.total, rel=0.02)


# What a dry run reads and leaves


def test_steps_and_lengths_are_those_of_the_data(tmp_path, tiny_folder):
    config = train_config(
        tiny_folder,
        tmp_path / "run",
        dry_run=True,
        task=rows_file(tmp_path, 21, length=42),
        stages=[StageConfig(), StageConfig(train_dims=["rank"], epochs=3)],
        batch_size=4,
        accumulation=2,
    )
    found = train(config)
    assert found.plan == estimate.Plan(tasks=1, examples=21, stages=2, steps=4 * 3)
    assert found.batch == estimate.Batch(sequences=4, length=48, answer=3)
    assert train(replace(config, batch_size=64)).batch.sequences == 21


def test_without_data_or_tokenizer_lengths_are_assumed_and_it_says_so(tmp_path, tiny_folder):
    missing = TaskConfig(name="jsonl", train=str(tmp_path / "none.jsonl"), test="none.jsonl")
    config = train_config(tiny_folder, tmp_path / "run", dry_run=True, task=missing)
    found = train(config)
    assert "none.jsonl: no such data file" in found.batch.assumed
    assert (found.batch.length, found.batch.answer) == (
        dry.ASSUMED_LENGTH,
        dry.ASSUMED_ANSWER,
    )
    assert found.plan is None and found.compute.run is None and found.memory.total

    bare = tmp_path / "bare"
    loading.architecture_of(config.model).save_pretrained(bare)
    found = train(replace(config, model=ModelConfig(path=str(bare)), task=TaskConfig()))
    assert found.batch.assumed == f"{bare} has no tokenizer" and found.batch.length == 512
    assert found.plan.examples == 1024 and found.compute.run

    folder = TaskConfig(name="instructions", folder=str(tmp_path / "*" / "none"))
    assert "no such folder" in train(replace(config, task=folder)).batch.assumed


def test_broken_data_is_refused_as_in_training(tmp_path, tiny_folder):
    task = rows_file(tmp_path, 8)
    Path(task.train).write_text('{"prompt"')
    config = train_config(tiny_folder, tmp_path / "run", dry_run=True, task=task)
    with pytest.raises(DataError, match=r"train\.jsonl:1: broken JSON"):
        train(config)


def test_nothing_is_written_and_the_run_never_knows(tmp_path, tiny_folder, capsys):
    config = train_config(tiny_folder, tmp_path / "run", dry_run=True)
    before = snapshot(tmp_path)
    train(config).show()
    assert snapshot(tmp_path) == before and not Path(config.run).exists()
    run = train(replace(config, dry_run=False, stages=[StageConfig()]))
    assert "dry_run" not in run.config_file.read_text() and run.begun().dry_run is False
    after = snapshot(tmp_path)
    assert run.claim(replace(run.begun(), dry_run=True)) is True
    train(replace(run.begun(), dry_run=True))  # a finished run may be rehearsed
    train(replace(config, seed=1))  # and another one in its place
    assert snapshot(tmp_path) == after
    train(replace(run.begun(), dry_run=False))
    assert "nothing to do" in capsys.readouterr().err


def test_a_hub_model_costs_two_small_files(tmp_path, tiny_folder, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        loading.architecture_of(ModelConfig(path=str(tiny_folder))).save_pretrained(
            tmp_path / "hub"
        )
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    config = train_config(tiny_folder, tmp_path / "run", dry_run=True)
    found = train(replace(config, model=ModelConfig(path="owner/name")))
    assert found.architecture == "LlamaForCausalLM"
    assert {name for name, _ in asked} == {"owner/name"}
    files = {pattern for _, patterns in asked for pattern in patterns}
    assert files == {"config.json", "generation_config.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space", "bloom"], "blocks 'transformer.h.*' matches nothing in LlamaForCausalLM"),
        (["--space", "FILE"], "'model.layers.0.mlp.up' matches no linear layer of the model"),
        (["--adapter.rank", "64", "--adapter.method", "sorsa"],
         "model.layers.0.self_attn.q_proj: sorsa: rank 64 exceeds the 32 singular values"),
        (["--model.path", "./nowhere"], "no config.json there"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--model.device", "warp"], "model.device 'warp'"),
        (["--start_from", "runs/none"], "runs/none does not exist"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_as_in_training(tmp_path, tiny_folder, capsys, arguments, message):
    declared = tiny.space_dict()
    declared["groups"]["mlp_width"]["outputs"] = ["mlp.gate_proj", "mlp.up"]
    own = space_file(tmp_path, declared)
    arguments = [own if argument == "FILE" else argument for argument in arguments]
    command = ["train", str(tmp_path / "run"), "--space", space_file(tmp_path / "good"),
               "--model.path", str(tiny_folder), *arguments]  # fmt: skip
    errors = []
    for switch in (["--dry_run"], []):
        assert not (tmp_path / "run").exists()
        assert main([*command, *switch]) == 1
        errors.append(capsys.readouterr().err)
    last = [error.splitlines()[-1] for error in errors]  # training may have said "Loading" before
    assert message in last[0] and last[0] == last[1]


def test_a_model_that_reads_values_is_estimated_as_far_as_possible(tmp_path, tiny_folder, capsys):
    architecture = loading.architecture_of(ModelConfig(path=str(tiny_folder)))
    architecture.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    architecture.save_pretrained(tmp_path / "base")
    text, found = dry_run(capsys, "--model.path", str(tmp_path / "base"), "--model.device", "cpu")
    assert found["memory"]["activations"] is found["memory"]["total"] is found["compute"] is None
    assert "unknown" in text and "DataDependent" in found["notes"][0]
    assert found["trained"] == 2 * R * (2 * (32 + 32) + (32 + 16) + 3 * (32 + 64) - 16)


# Tasks before this one


def test_a_sequence_carries_its_finished_tasks(tmp_path, tiny_folder):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        rows_file(tmp_path / name, 8)
    files = {split: str(tmp_path / "{task}" / f"{split}.jsonl") for split in ("train", "test")}
    task = TaskConfig(name="jsonl", **files)
    config = train_config(tiny_folder, tmp_path / "run", dry_run=True, task=task,
                          tasks=["a", "b", "c"])  # fmt: skip
    only = TaskConfig(**{**vars(task), **{k: v.format(task="a") for k, v in files.items()}})
    olora = replace(config.adapter, method="olora")
    alone = train(replace(config, tasks=[], task=only, adapter=olora))
    found = train(config)
    assert found.method == alone.method == "olora"
    assert found.memory.factors == 3 * alone.memory.factors
    assert found.memory.gradients == alone.memory.gradients
    assert found.trained == alone.trained
    assert found.memory.activations > alone.memory.activations
    assert found.plan.tasks == 3 and found.plan.steps == 3 * alone.plan.steps
    assert found.compute.maximal > alone.compute.maximal


def test_a_run_continued_carries_the_one_before(tmp_path, tiny_folder):
    first = train_config(tiny_folder, tmp_path / "first", stages=[StageConfig()],
                         adapter=tiny.ADAPTERS["olora"])  # fmt: skip
    train(first)
    second = replace(first, run=str(tmp_path / "second"), start_from=first.run, dry_run=True)
    alone = train(replace(second, start_from=None))
    assert train(second).memory.factors == 2 * alone.memory.factors
    with pytest.raises(ConfigError, match=r"was trained with adapter rank 8, not 4"):
        train(replace(second, adapter=replace(first.adapter, rank=4)))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_takes_what_its_packed_tensors_take(tmp_path, kind):
    folder = tiny.save_tiny(tmp_path / "model", hidden_size=64, intermediate_size=128)
    config = train_config(folder, tmp_path / "run")
    config = replace(config, model=replace(config.model, quantise=kind))
    base = loading.load_model(str(folder), config.model)
    held = sum(tensor.nbytes for tensor in (*base.parameters(), *base.buffers()))
    found = dry.estimate(config)
    assert found.memory.base == held < dry.estimate(train_config(folder, tmp_path)).memory.base
    assert any("not quantised" in note for note in found.notes)


def test_gradient_checkpointing_is_less_memory_for_more_compute(tmp_path, tiny_folder):
    config = train_config(tiny_folder, tmp_path / "run")
    plain, less = (dry.estimate(replace(config, gradient_checkpointing=on)) for on in (0, 1))
    assert less.memory.activations < plain.memory.activations / 2
    assert plain.compute.maximal < less.compute.maximal < 2 * plain.compute.maximal
