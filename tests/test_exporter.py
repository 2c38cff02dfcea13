"""What is written computes what was trained, and whatever does not is never kept."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import typing

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from elastic import __main__, exporter, models, proof, verify, writers
from elastic.config import ExportConfig, ModelConfig, StageConfig
from elastic.errors import BaseMismatch, ConfigError, ExportError, MissingExtra, RunError
from elastic.evaluate import answers, evaluate
from elastic.exporter import export
from elastic.evaluate_config import EvaluateConfig
from elastic.evaluating import evaluate_run
from elastic.files import new_directory, write_json
from elastic.formats import hf, onnx, openvino, peft, weigh
from elastic.latency import measure
from elastic.merging import compact
from elastic.run import Run
from elastic.runners import TorchRunner
from elastic.space import SubAdapter
from elastic.tasks import load_task
from elastic.training import train
from elastic.verify import NEW_TOKENS, Agreement, Probe, agreement
from tests import tiny
from tests.tiny_runs import (
    ONE_ROUND,
    copy_run,
    move_factors,
    randomize_factors,
    snapshot,
    train_config,
)

FIELDS = {
    "path", "bytes", "max_abs_diff", "greedy_tokens_equal",
    "prefill_ms", "decode_ms", "full_prefill_ms", "full_decode_ms",
}  # fmt: skip
# Of the largest logit. float32: sums in another order, over two layers; float64: the same.
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """By dtype, a run whose factors are large enough to show. Exports go into it, under one name
    per test."""
    found = {}
    for dtype in TOLERANCE:
        folder = tmp_path_factory.mktemp(dtype)
        model = ModelConfig(path=str(tiny_folder), dtype=dtype, device="cpu")
        found[dtype] = train(train_config(tiny_folder, folder / "run", model=model))
        randomize_factors(found[dtype])
    return found


@pytest.fixture(scope="module")
def run(runs):
    return runs["float32"]


@pytest.fixture(scope="module")
def nets(runs):
    """By dtype, the supernet, which no test changes."""
    return {dtype: run.load()[2] for dtype, run in runs.items()}


def config(run: Run, **overrides) -> ExportConfig:
    settings = dict(formats=["hf"], accuracy=False, timing=ONE_ROUND)
    return ExportConfig(run=str(run.path), **(settings | overrides))


def logits_close(found: torch.Tensor, expected: torch.Tensor, dtype: str = "float32") -> None:
    atol = TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def active_logits(net, sub, ids) -> torch.Tensor:
    with net.active(sub) as model:
        return tiny.logits(model, ids)


def mixed(net, seed: int = 0) -> SubAdapter:
    """Every group on its own: layers of different sizes. None of 32: on CPUs with AMX, OpenVINO
    2026.4 fuses MLPs of multiples of 32 channels at bfloat16 and ends the process at exactly 32."""
    for number in range(seed, seed + 100):
        sub = net.space.random(random.Random(number))
        widths = {c for name, c in sub.choices if name.endswith("mlp_width")}
        if len(widths) > 1 and 32 not in widths:
            return sub
    raise AssertionError("no such sub-adapter")


def mixed_ranks(net) -> SubAdapter:
    """Full size but for ranks, which differ from layer to layer."""
    indices = {g.name: i % len(g.choices) if g.dim == "rank" else 0
               for i, g in enumerate(net.space)}  # fmt: skip
    return net.space.at(indices)


def write_sub(sub: SubAdapter, file) -> str:
    write_json(file, sub.as_dict())
    return str(file)


def hidden(folder) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


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
    run = train(train_config(base, tmp_path / "run"))
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
        assert len(found["texts"]) == 3
        if found["deployed"]["precision"] == "float32":
            assert found["deployed"]["tokens_equal"] == 4 * NEW_TOKENS
            assert found["accuracy"] == report["accuracy"]
            # What torch says of the same prompts, token by token.
            assert found["texts"] == report["formats"]["hf"]["texts"]
    assert [
        report["formats"][kind]["deployed"]["precision"] for kind in ("hf", "peft", "onnx")
    ] == ["float32"] * 3
    told = (directory / "report.md").read_text()
    assert told.splitlines()[0] == report["verdict"]
    test = load_task(run.config().task, run.config().seed).test
    full = compact(net, net.space.maximal())
    assert [sample["full"] for sample in report["samples"]] == answers(
        full, tiny.tokenizer(), test[:3], new_tokens=proof.TEXT_TOKENS
    )
    assert (directory / "onnx" / "model.onnx").is_file()
    assert (directory / "openvino" / "openvino_model.xml").is_file()
    for kind in ("onnx", "openvino"):
        assert (directory / kind / "tokenizer.json").is_file()

    model = compact(net, sub)
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
    run = train(train_config(tiny_folder, tmp_path / "run", **settings))
    move_factors(run)
    net = run.load()[2]
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


# What must not pass.


def wrong_frequencies(write):
    """hf.write, whose config then says another base of the rotary embeddings."""

    def written(model, tokenizer, directory, **kwargs):
        write(model, tokenizer, directory, **kwargs)
        file = directory / "config.json"
        saved = json.loads(file.read_text())
        saved["rope_theta"] = saved["rope_parameters"]["rope_theta"] = 7.0
        file.write_text(json.dumps(saved))
        return directory

    return written


def wrong_weight(write):
    """hf.write that changes one number by a little."""

    def written(model, tokenizer, directory, **kwargs):
        write(model, tokenizer, directory, **kwargs)
        file = directory / "model.safetensors"
        state = load_file(file)
        state["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
        save_file(state, file, metadata={"format": "pt"})
        return directory

    return written


def wrong_factor(write):
    """peft.write that forgets the scale of one layer."""

    def written(net, sub, directory, **kwargs):
        write(net, sub, directory, **kwargs)
        file = directory / "adapter_model.safetensors"
        state = load_file(file)
        state["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"] /= 3
        save_file(state, file, metadata={"format": "pt"})
        return directory

    return written


def wrong_graph(write):
    """onnx.write of a model with one weight off."""

    def written(model, directory, **kwargs):
        with torch.no_grad():
            weight = model.model.layers[1].mlp.up_proj.weight
            weight[0, 0] += 0.5
            try:
                return write(model, directory, **kwargs)
            finally:
                weight[0, 0] -= 0.5

    return written


DIFFERENCE = r"logits differ from the supernet by up to [\d.e+-]+, more than the [\d.e+-]+"
FAULTS = {
    "hf weight": (hf, wrong_weight, r"^hf: model\.layers\.1\.mlp\.up_proj\.weight is not the same"),
    "hf config": (hf, wrong_frequencies, f"^hf: {DIFFERENCE}"),
    "peft": (peft, wrong_factor, f"^peft: {DIFFERENCE}"),
    "onnx": (onnx, wrong_graph, f"^onnx: {DIFFERENCE}"),
}


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """A copy of the run with an export called "kept"."""
    run = copy_run(runs["float32"], tmp_path_factory.mktemp("exported") / "run")
    shutil.rmtree(run.path / "export", ignore_errors=True)
    export(config(run, sub_adapter="maximal", name="kept"))
    return run


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_found_and_nothing_is_kept(exported, tmp_path, monkeypatch, fault, capsys):
    module, corrupt, message = FAULTS[fault]
    kind = fault.split()[0]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "write", corrupt(module.write))
    before = snapshot(exported.path)
    for name in ("kept", "new"):
        with pytest.raises(ExportError, match=message):
            export(config(exported, sub_adapter="maximal", name=name, formats=["hf", kind]))
    assert snapshot(exported.path) == before
    assert not (exported.path / "export" / "new").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_good_export_takes_the_place_of_the_old_one(exported, tmp_path):
    run = copy_run(exported, tmp_path / "run")
    (run.path / "export" / "kept" / "old.txt").write_text("old")
    export(config(run, sub_adapter="minimal", name="kept"))
    folder = run.path / "export" / "kept"
    assert {f.name for f in folder.iterdir()} == {"report.json", "report.md", "hf"}
    assert json.loads((folder / "report.json").read_text())["name"] == "minimal"
    assert not hidden(run.path)


def test_another_base_is_refused_before_its_weights(exported, tmp_path, tiny_folder, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    run = copy_run(exported, tmp_path / "run")
    settings = yaml.safe_load(run.config_file.read_text())
    settings["model"]["path"] = str(base)
    run.config_file.write_text(yaml.safe_dump(settings))
    run.load()  # the same weights in another folder are the same base
    old = models.digest(base)
    tiny.save_tiny(base, seed=1)
    new = models.digest(base)
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("weights were loaded"))
    before = snapshot(run.path)
    with pytest.raises(BaseMismatch) as caught:
        export(config(run, sub_adapter="maximal"))
    assert old != new and old in str(caught.value) and new in str(caught.value)
    assert snapshot(run.path) == before


def test_a_directory_that_is_no_export_is_refused(exported, tmp_path):
    run = copy_run(exported, tmp_path / "run")
    (run.path / "export" / "mine").mkdir()
    (run.path / "export" / "mine" / "thesis.txt").write_text("years")
    before = snapshot(run.path)
    with pytest.raises(RunError, match="is no export"):
        export(config(run, sub_adapter="maximal", name="mine"))
    assert snapshot(run.path) == before


def test_what_is_no_sub_adapter_is_refused(exported, tmp_path):
    with pytest.raises(RunError, match=r"unknown sub-adapter 'maximl'; did you mean 'maximal'"):
        export(config(exported, sub_adapter="maximl"))
    with pytest.raises(RunError, match="elastic search"):
        export(config(exported, sub_adapter="best"))
    foreign = write_sub(SubAdapter((("model.layers.0.mlp_width", 64),)), tmp_path / "foreign.json")
    with pytest.raises(RunError, match="differ in 7 groups"):
        export(config(exported, sub_adapter=foreign))


def test_an_untrained_run_is_refused(tmp_path, capsys):
    with pytest.raises(RunError, match=f"elastic train --run {tmp_path}"):
        export(ExportConfig(run=str(tmp_path)))
    assert __main__.main(["export", str(tmp_path)]) == 1


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_what_cannot_be_traced_is_named(exported, monkeypatch, kind, capsys):
    def forward(self, x):
        return torch.special.bessel_j0(x)

    monkeypatch.setattr(onnx, "_example", untraceable(onnx._example, monkeypatch, forward))
    before = snapshot(exported.path)
    arguments = ["export", str(exported.path), "--sub_adapter", "maximal", "--name", "kept",
                 "--formats", f"hf,{kind}", "--accuracy", "false", "--timing.rounds", "1",
                 "--timing.max_rounds", "1"]  # fmt: skip
    assert __main__.main(arguments) == 1
    said = capsys.readouterr().err
    assert f"error: {kind}" in said and "LlamaForCausalLM cannot be traced" in said
    assert "'aten::special_bessel_j0'" in said
    assert snapshot(exported.path) == before


def untraceable(example, monkeypatch, forward):
    """Puts an operator that ONNX lacks into every MLP, once the sample arguments are there."""

    def made(model):
        found = example(model)
        monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", forward)
        return found

    return made


@pytest.mark.parametrize(
    ("kind", "package", "extra"),
    [("onnx", "onnx", "onnx"), ("onnx", "onnxruntime", "onnx"), ("openvino", "onnx", "onnx"),
     ("openvino", "openvino", "openvino")],
)  # fmt: skip
def test_a_missing_runtime_is_named_before_anything_slow(
    exported, monkeypatch, kind, package, extra
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(MissingExtra, match=rf"needs {package}, .*elastic-adapters\[{extra}\]"):
        export(config(exported, sub_adapter="maximal", formats=["hf", kind]))


@contextlib.contextmanager
def small_files(most: int = 60_000):
    """No file may grow beyond this: a real failure of whatever writes."""
    signals = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, signals)


@pytest.mark.parametrize("kind", ["hf", "onnx", "openvino"])
def test_a_full_disk_is_named_and_nothing_is_kept(exported, monkeypatch, kind, capfd):
    module = {"hf": hf, "onnx": onnx, "openvino": openvino}[kind]
    write = module.write

    def limited(*args, **kwargs):
        with small_files():
            return write(*args, **kwargs)

    monkeypatch.setattr(module, "write", limited)
    before = snapshot(exported.path)
    arguments = ["export", str(exported.path), "--sub_adapter", "maximal", "--name", "kept",
                 "--formats", kind]  # fmt: skip
    assert __main__.main(arguments) == 1
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "cannot be written" in said and "kept" in said
    assert ("disk full?" if kind == "openvino" else "File too large") in said
    assert snapshot(exported.path) == before


def test_what_a_killed_export_left_is_cleared_away(exported, tmp_path):
    run = copy_run(exported, tmp_path / "run")
    kept = snapshot(run.path / "export" / "kept")
    child = os.fork()
    if child == 0:
        with new_directory(run.path / "export" / "big") as building:
            (building / "hf").mkdir()
            (building / "report.json").write_text("{}")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    [left] = hidden(run.path)
    assert left.startswith(".big.")
    with pytest.raises(RunError, match="nothing was exported there; exported were: kept"):
        evaluate_run(EvaluateConfig(
            run=str(run.path), sub_adapter="big", exported="onnx", harness=["x"]))  # fmt: skip
    export(config(run, sub_adapter="minimal", name="other"))
    assert not hidden(run.path)
    assert {path.name for path in (run.path / "export").iterdir()} == {"kept", "other"}
    assert snapshot(run.path / "export" / "kept") == kept


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/tmp/x", ".hidden"])
def test_a_name_is_one_directory(name):
    with pytest.raises(ConfigError, match="without slashes"):
        ExportConfig(name=name)


def test_what_could_not_be_weighed_is_left_out(exported, monkeypatch, capsys):
    def fails(loads):
        raise RunError("hf: killed")

    monkeypatch.setattr(weigh, "weigh", fails)
    report = export(config(exported, sub_adapter="maximal", name="unweighed"))
    found = report.contents["formats"]["hf"]
    assert found["memory_mb"] is None and found["full_load_s"] is None
    assert "hf: killed" in capsys.readouterr().err
    report.show()
    assert "- / -" in capsys.readouterr().out


# The comparison itself.


class Replay:
    """A runner that says the logits it was given, one row after another."""

    def __init__(self, logits):
        self.logits = np.array(logits, dtype=float)

    def prefill(self, input_ids):
        self.fed, self.step = [input_ids], 0
        return self.logits[None, 0]

    def decode(self, input_ids):
        self.fed.append(input_ids)
        self.step += 1
        return self.logits[None, self.step]


def probe(logits) -> Probe:
    logits = np.array(logits, dtype=float)
    return Probe(np.array([[5, 6, 7]]), logits.argmax(-1)[None], logits)


EXPECTED = [[1.0, 2.0, 0.0], [0.0, 1.0, -4.0], [3.0, 0.0, 0.0]]


def test_agreement_with_oneself():
    runner = Replay(EXPECTED)
    assert agreement(runner, [probe(EXPECTED)]) == Agreement(0.0, 4.0, 3, 3, False)
    # The prompt, then the supernet's tokens: the last one is never fed.
    assert [ids.tolist() for ids in runner.fed] == [[[5, 6, 7]], [[1]], [[1]]]


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("which", range(2))
def test_agreement_reports_the_largest_difference(step, which):
    wrong = np.array(EXPECTED)
    wrong[step, 2] -= 0.25
    probes = [probe(EXPECTED), probe(EXPECTED)]

    class Second(Replay):
        def prefill(self, input_ids):
            self.calls = getattr(self, "calls", -1) + 1
            self.logits = np.array(wrong if self.calls == which else EXPECTED)
            return super().prefill(input_ids)

    assert agreement(Second(EXPECTED), probes) == Agreement(0.25, 4.0, 6, 6, False)


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("side", ["found", "expected"])
def test_agreement_flags_nan(step, side):
    broken = np.array(EXPECTED)
    broken[step, 1] = np.nan
    mine, theirs = (broken, EXPECTED) if side == "found" else (EXPECTED, broken)
    found = agreement(Replay(mine), [probe(theirs), probe(theirs)])
    assert np.isnan(found.max_abs_diff)
    assert not found.greedy_tokens_equal and found.decided


def test_a_model_of_nan_is_not_exported(exported, monkeypatch):
    class Nan(TorchRunner):
        def decode(self, input_ids):
            return super().decode(input_ids) * np.nan

    before = snapshot(exported.path)
    real = exporter.probe
    monkeypatch.setattr(writers, "runner_of", Nan)
    probes = []

    def honest(*args):
        probes.append(real(*args))
        return probes[-1]

    monkeypatch.setattr(exporter, "probe", honest)
    with pytest.raises(ExportError, match=r"^hf: its logits are not numbers"):
        export(config(exported, sub_adapter="maximal"))
    assert len(probes) == 4 and all(len(p.logits) == NEW_TOKENS for p in probes)
    assert snapshot(exported.path) == before


def test_a_tie_may_fall_either_way_but_a_decided_token_may_not():
    tie = probe([[1.0, 1.001, 0.0]])
    other = agreement(Replay([[1.001, 1.0, 0.0]]), [tie])
    assert not other.greedy_tokens_equal and not other.decided
    clear = probe([[1.0, 2.0, 0.0]])
    shifted = agreement(Replay([[2.4, 2.3, 0.0]]), [clear])  # 1.4 off explains a gap of 1
    assert not shifted.greedy_tokens_equal and not shifted.decided


def test_probes_are_the_supernets_own_greedy_continuation(nets):
    net = nets["float64"]
    sub = mixed(net)
    prompt = tiny.tokens(1, 5)
    with net.active(sub) as model:
        found = verify.probe(model, prompt.numpy())
    ids = prompt
    for step in range(NEW_TOKENS):
        logits = active_logits(net, sub, ids)[0, -1]
        np.testing.assert_allclose(found.logits[step], logits.numpy(), rtol=0, atol=1e-9)
        assert found.tokens[0, step] == int(logits.argmax())
        ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
    assert net.current == net.space.maximal()


def test_every_format_of_the_settings_can_be_written():
    [kinds] = typing.get_args(typing.get_type_hints(ExportConfig)["formats"])
    assert list(typing.get_args(kinds)) == list(writers.FORMATS)
