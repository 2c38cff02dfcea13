"""What is written computes what was trained, and whatever does not is never kept."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from elastic import __main__
from elastic.config import CompensationConfig, StageConfig
from elastic.data import load_task
from elastic.errors import DataMissing
from elastic.evaluation.evaluate import answers, evaluate
from elastic.evaluation.statistics import Score
from elastic.exporting import command, proof
from elastic.exporting.command import export
from elastic.exporting.probes import NEW_TOKENS
from elastic.files import write_json
from elastic.formats import hf, onnx, peft
from elastic.formats.runner import TorchRunner
from elastic.latency.measure import measure
from elastic.spaces.bound import SubAdapter
from elastic.supernet.compact import compact
from elastic.supernet.store import load_run
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.exports import (
    TOLERANCE,
    active_logits,
    config,
    hidden,
    logits_close,
    mixed_ranks,
    write_sub,
)
from tests.helpers.searches import choices_task
from tests.helpers.tiny_runs import move_factors, train_config

ANY_DEGREE = CompensationConfig()
FIELDS = {
    "path", "bytes", "max_abs_diff", "greedy_tokens_equal",
    "prefill_ms", "decode_ms", "full_prefill_ms", "full_decode_ms",
}  # fmt: skip
NEAR_TIE = 0.02
"""Of the largest logit: what 8-bit caches change of a random model's logits, and some more."""


def mixed(net, seed: int = 0) -> SubAdapter:
    """Every group on its own: layers of different sizes. None of 32: on CPUs with AMX, OpenVINO
    2026.4 fuses MLPs of multiples of 32 channels at bfloat16 and ends the process at exactly 32."""
    for number in range(seed, seed + 100):
        sub = net.space.random(random.Random(number))
        widths = {c for name, c in sub.choices if name.endswith("mlp_width")}
        if len(widths) > 1 and 32 not in widths:
            return sub
    raise AssertionError("no such sub-adapter")


def decided(model, example, new_tokens: int) -> list[int]:
    """The greedy answer up to the first token that nearly ties with another: random models are full
    of those, and OpenVINO keeps its cache in 8 bits as it is deployed."""
    prompt = tiny.tokenizer()(example.prompt, return_tensors="pt").input_ids
    written = model.generate(
        prompt, max_new_tokens=new_tokens, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    logits = torch.cat(written.logits)
    best, second = logits.topk(2).values.unbind(-1)
    ties = (best - second < NEAR_TIE * logits.abs().max()).tolist()
    answer = written.sequences[0, prompt.shape[1] :].tolist()
    return answer[: ties.index(True)] if True in ties else answer


# hf


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", ["uniform", "mixed"])
def test_hf_folder_is_the_active_sub_adapter(runs, nets, tmp_path, dtype, shape):
    run, net = runs[dtype], nets[dtype]
    sub = net.space.uniform(0.5) if shape == "uniform" else mixed(net)
    file = write_sub(sub, tmp_path / f"{shape}.json")
    report = export(config(run, sub_adapter=file))
    folder = report.directory / "hf"
    assert report.directory == run.path / "export" / shape

    code = (folder / "modeling_elastic.py").exists()
    assert code == (shape == "mixed")
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=code, dtype=getattr(torch, dtype)
    ).eval()
    assert type(loaded).__name__ == ("ElasticLlamaForCausalLM" if code else "LlamaForCausalLM")
    saved = json.loads((folder / "config.json").read_text())
    assert saved["architectures"] == [type(loaded).__name__]
    expected_state = compact(net, sub).state_dict()
    assert loaded.state_dict().keys() == expected_state.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected_state[name]), name

    expected = active_logits(net, sub, ids := tiny.tokens(3, 9))
    logits_close(tiny.logits(loaded, ids), expected, dtype)
    assert not torch.allclose(expected, active_logits(net, net.space.maximal(), ids), atol=0.1)
    # Generation, too: the cache knows how many heads each layer has.
    again = TorchRunner(loaded)
    stepwise = [again.prefill(ids[:, :4].numpy())]
    stepwise += [again.decode(ids[:, i : i + 1].numpy()) for i in range(4, 9)]
    logits_close(torch.from_numpy(np.stack(stepwise, 1)), expected[:, 3:], dtype)

    found = report.contents["formats"]["hf"]
    assert found["greedy_tokens_equal"] is True
    assert found["max_abs_diff"] <= TOLERANCE[dtype] * found["largest_logit"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Tom has 3")["input_ids"] == tiny.tokenizer()("Tom has 3")["input_ids"]


def test_a_bfloat16_base_is_written_as_bfloat16(tmp_path, monkeypatch):
    base = tiny.save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    run = train_one(train_config(base, tmp_path / "run"))
    timed = {}

    def noted(runners, *args, **kwargs):
        timed.update(runners)
        return measure(runners, *args, **kwargs)

    monkeypatch.setattr(proof, "measure", noted)
    report = export(config(run, sub_adapter="maximal"))
    state = load_file(report.directory / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(report.directory / "hf").dtype == torch.bfloat16
    # Timed and scored as it is, the full model beside it in the same type.
    assert [runner.model.dtype for runner in timed.values()] == [torch.bfloat16] * 2
    found = report.contents["formats"]["hf"]
    assert found["deployed"]["precision"] == "bfloat16" and found["accuracy_n"] == 8
    assert found["full_accuracy_n"] == 8 and found["difference"] == 0  # from itself
    assert report.contents["accuracy"] is None


# peft


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("ranks", ["maximal", "mixed"])
def test_peft_folder_is_the_active_sub_adapter(runs, nets, tiny_folder, tmp_path, dtype, ranks):
    run, net = runs[dtype], nets[dtype]
    for index in net.order.values():  # or going back to the base's order would show nothing
        assert len(index) < 3 or not torch.equal(index, torch.arange(len(index)))
    sub = net.space.maximal() if ranks == "maximal" else mixed_ranks(net)
    file = write_sub(sub, tmp_path / f"peft-{ranks}.json")
    report = export(config(run, sub_adapter=file, formats=["peft"]))
    folder = report.directory / "peft"
    assert {f.name for f in folder.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=getattr(torch, dtype))
    ids = tiny.tokens(3, 9)
    plain = tiny.logits(base.eval(), ids)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    expected = active_logits(net, sub, ids)
    logits_close(tiny.logits(model, ids), expected, dtype)
    assert not torch.allclose(expected, plain, atol=0.1)

    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tiny_folder)
    if ranks == "mixed":
        assert (
            saved["rank_pattern"] and saved["alpha_pattern"].keys() == saved["rank_pattern"].keys()
        )
        scale = tiny.ALPHA / tiny.RANK
        for site, rank in saved["rank_pattern"].items():
            assert saved["alpha_pattern"][site] == pytest.approx(scale * rank)
        state = load_file(folder / "adapter_model.safetensors")
        found = {site: state[f"base_model.model.{site}.lora_A.weight"].shape[0]
                 for site in net.space.targets}  # fmt: skip
        chosen = {cut.site: sub[g.name] for g in net.space for cut in g.cuts if cut.axis == "rank"}
        assert found == {site: chosen.get(site, tiny.RANK) for site in net.space.targets}
        assert len(set(found.values())) > 2
    assert report.contents["formats"]["peft"]["max_abs_diff"] <= (
        TOLERANCE[dtype] * report.contents["formats"]["peft"]["largest_logit"]
    )


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_every_method_is_written_as_a_plain_lora(tmp_path, method):
    """On the untouched base stock PEFT computes what the supernet does."""
    net = tiny.supernet(method, heads=True)
    net.reorder(tiny.permutations(net))
    ids = tiny.tokens(3, 9)
    for name, sub in (("maximal", net.space.maximal()), ("mixed", mixed_ranks(net))):
        folder = peft.write(net, sub, tmp_path / name, base_model="tiny")
        model = PeftModel.from_pretrained(tiny.llama(), str(folder)).double().eval()
        logits_close(tiny.logits(model, ids), active_logits(net, sub, ids), "float64")
        site = "model.layers.0.self_attn.q_proj"
        with net.active(sub):
            A, _ = net.layer(site).factors()
        assert model.get_submodule(f"base_model.model.{site}").r["default"] == len(A)


def test_peft_of_a_cut_base_is_skipped_with_the_reason(run, capsys):
    report = export(config(run, sub_adapter="minimal", formats=["hf", "peft"], name="cut"))
    [(key, reason)] = report.contents["formats"]["peft"].items()
    assert key == "skipped" and "cut the base model" in reason
    assert not (report.directory / "peft").exists()
    assert (report.directory / "hf").is_dir()
    report.show()
    assert "peft: not written" in capsys.readouterr().out


# All of it.


def test_all_formats_of_one_sub_adapter(run, nets, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    net = nets["float32"]
    sub = mixed_ranks(net)  # cuts no channel, so that PEFT can express it too
    file = write_sub(sub, tmp_path / "all.json")
    arguments = ["export", str(run.path), "--sub_adapter", file, "--timing.prompt_tokens", "4",
                 "--timing.rounds", "1", "--timing.max_rounds", "1"]  # fmt: skip
    assert __main__.main(arguments) == 0
    directory = run.path / "export" / "all"
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {"report": str(directory / "report.json")}
    report = json.loads((directory / "report.json").read_text())

    model = compact(net, sub)
    test = load_task(run.config().task, run.config().seed).test
    decided_tokens = [decided(model, example, NEW_TOKENS) for example in test[:4]]
    decided_texts = [
        tiny.tokenizer().decode(decided(model, example, proof.TEXT_TOKENS))
        for example in test[: proof.TEXTS]
    ]
    assert sum(map(len, decided_tokens)) >= NEW_TOKENS and any(decided_texts)
    assert list(report["formats"]) == ["hf", "peft", "onnx", "openvino"]
    for kind, found in report["formats"].items():
        assert set(found) >= FIELDS, kind
        assert found["path"] == str(directory / kind)
        files = [f for f in (directory / kind).rglob("*") if f.is_file()]
        assert found["bytes"] == sum(f.stat().st_size for f in files) > 0
        assert found["greedy_tokens_equal"] is True
        assert 0 < found["max_abs_diff"] <= 2e-4 * found["largest_logit"]
        assert all(found[key] > 0 for key in FIELDS if key.endswith("_ms"))
        assert found["deployed"]["tokens"] == 4 * NEW_TOKENS
        assert (found["load_s"], found["full_memory_mb"]) == (0.125, 20.0)
        assert found["full_bytes"] > 0 and found["accuracy_n"] == report["accuracy_n"] == 8
        assert found["full_accuracy_n"] == 8 and len(found["difference_interval"]) == 2
        assert len(found["texts"]) == 3
        if found["deployed"]["precision"] == "float32":
            assert found["accuracy"] == report["accuracy"]
            assert found["deployed"]["tokens_equal"] >= sum(map(len, decided_tokens[:4]))
            # What torch says of the same prompts, as far as no rounding decides.
            for said, beginning in zip(found["texts"], decided_texts, strict=True):
                assert said.startswith(beginning)
    assert [
        report["formats"][kind]["deployed"]["precision"] for kind in ("hf", "peft", "onnx")
    ] == ["float32"] * 3
    told = (directory / "report.md").read_text()
    assert told.splitlines()[0] == report["verdict"]
    full = compact(net, net.space.maximal())
    assert [sample["full"] for sample in report["samples"]] == answers(
        full, tiny.tokenizer(), test[:3], new_tokens=proof.TEXT_TOKENS
    )
    assert (directory / "onnx" / "model.onnx").is_file()
    assert (directory / "openvino" / "openvino_model.xml").is_file()
    for kind in ("onnx", "openvino"):
        assert (directory / kind / "tokenizer.json").is_file()

    assert report["sub_adapter"] == sub.as_dict()
    assert report["params"] == sum(p.numel() for p in model.parameters()) == report["full_params"]
    trained = run.config()
    score = evaluate(model, tiny.tokenizer(), load_task(trained.task, trained.seed).test)
    assert {key: report[key] for key in score.as_dict()} == score.as_dict()
    assert not hidden(run.path)


@pytest.mark.parametrize("method", ["sorsa", "prolora", "olora", "soslora"])
def test_exported_is_what_every_method_trained(tiny_folder, tmp_path, method):
    """The command compares each written model with the supernet; here the folders are loaded. The
    graphs come from the same merged weights, so one method tells for all."""
    settings = dict(adapter=tiny.ADAPTERS[method], stages=[StageConfig()])
    run = train_one(train_config(tiny_folder, tmp_path / "run", **settings))
    move_factors(run)
    net = load_run(run)[2]
    file = write_sub(mixed(net), tmp_path / "mixed.json")
    graphs = ["onnx", "openvino"] if method == "soslora" else []
    report = export(config(run, sub_adapter=file, formats=["hf", *graphs]))
    loaded = hf.load(report.directory / "hf", torch.float32)
    ids = tiny.tokens(2, 6)
    expected = active_logits(net, mixed(net), ids)
    logits_close(tiny.logits(loaded, ids), expected)
    if graphs:
        found = onnx.OnnxRunner(report.directory / "onnx" / "model.onnx").prefill(ids.numpy())
        logits_close(torch.from_numpy(found), expected[:, -1])
    for kind in graphs:
        entry = report.contents["formats"][kind]
        assert entry["greedy_tokens_equal"]
        assert entry["max_abs_diff"] <= 2e-4 * entry["largest_logit"]
    whole = export(config(run, sub_adapter="maximal", formats=["peft"]))
    rank = {"sorsa": 2, "soslora": 2}.get(method, 1) * tiny.RANK
    assert whole.contents["formats"]["peft"]["rank"] == rank


def test_the_score_of_the_search_is_reported_again(run, nets):
    """Only where the search scored this very sub-adapter."""
    scored = {"accuracy": 0.123, "accuracy_n": 77, "accuracy_interval": [0.1, 0.2]}
    maximal = nets["float32"].space.maximal().as_dict()
    file = run.sub_adapters / "scored.json"
    write_json(file, {**scored, "sub_adapter": maximal})
    report = export(config(run, sub_adapter="scored"))
    assert {key: report.contents[key] for key in scored} == scored
    minimal = nets["float32"].space.minimal().as_dict()
    other = file.with_name("other.json")
    write_json(other, {**scored, "sub_adapter": minimal})
    write_json(run.path / "elsewhere" / "other.json", maximal)
    config_ = config(run, sub_adapter=str(run.path / "elsewhere" / "other.json"))
    assert export(config_).contents["accuracy"] is None


@pytest.mark.parametrize("left_out", [(), ("correct",), ("full_correct",)])
def test_test_examples_are_scored_once(run, nets, monkeypatch, left_out):
    """By the search, which keeps what was right; an earlier version did not."""
    minimal = nets["float32"].space.minimal().as_dict()
    kept = {"correct": "11110000", "full_correct": "11111010"}
    saved = {"accuracy": 0.5, "accuracy_n": 8, "accuracy_interval": [0.2, 0.8], **kept}
    saved = {name: value for name, value in saved.items() if name not in left_out}
    write_json(run.sub_adapters / "kept.json", {**saved, "sub_adapter": minimal})
    asked = []

    def evaluated(*_, **__):
        asked.append(1)
        return Score.of_marks("10000000")

    monkeypatch.setattr(command, "evaluate", evaluated)
    report = export(config(run, sub_adapter="kept", formats=["hf"], accuracy=True))
    of_hf = report.contents["formats"]["hf"]
    assert len(asked) == (2 if left_out else 0)
    if not left_out:
        assert (of_hf["accuracy"], of_hf["full_accuracy"]) == (0.5, 0.75)
        assert of_hf["difference"] == -0.25


# Without data


def test_an_export_without_accuracy_needs_no_data(tiny_folder, tmp_path):
    (tmp_path / "data").mkdir()
    task = choices_task(tmp_path / "data")
    settings = dict(task=task, stages=[StageConfig()], max_steps=1)
    run = train_one(train_config(tiny_folder, tmp_path / "run", **settings))
    with_data = export(config(run, name="with", sub_adapter="maximal"))
    (tmp_path / "data" / "test.jsonl").unlink()
    without = export(config(run, name="without", sub_adapter="maximal"))
    written = [each.directory / "hf" / "model.safetensors" for each in (with_data, without)]
    assert written[0].read_bytes() == written[1].read_bytes()
    assert without.contents["formats"]["hf"]["greedy_tokens_equal"] is True
    for name, change in (
        ("maximal", {"accuracy": True}),
        ("minimal", {"compensation": ANY_DEGREE}),
    ):
        with pytest.raises(DataMissing, match=r"test\.jsonl: no such data file"):
            export(config(run, name="refused", sub_adapter=name, **change))
    assert not (run.path / "export" / "refused").exists()
