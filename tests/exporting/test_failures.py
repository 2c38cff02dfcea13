"""An export that fails says why, ends with an error and leaves what was there before."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from elastic import __main__
from elastic.config import ExportConfig
from elastic.errors import BaseMismatch, ConfigError, ExportError, MissingExtra, RunError
from elastic.exporting import probes, targets
from elastic.exporting.command import export
from elastic.exporting.probes import NEW_TOKENS
from elastic.files import new_directory
from elastic.formats import hf, onnx, onnx_decoder, openvino, peft
from elastic.formats.runner import TorchRunner
from elastic.latency import weigh
from elastic.models import loading
from elastic.models.digest import digest_of
from elastic.spaces.bound import SubAdapter
from elastic.supernet.store import load_run
from tests.helpers import tiny
from tests.helpers.exports import config, hidden, small_files, write_sub
from tests.helpers.tiny_runs import copy_run, snapshot


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
def exported(run):
    """A run with an export called "kept"."""
    export(config(run, sub_adapter="maximal", name="kept"))
    return run


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_found_and_nothing_is_kept(exported, tmp_path, monkeypatch, fault, capsys):
    module, corrupt, message = FAULTS[fault]
    kind = fault.split()[0]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "write", corrupt(module.write))
    before = snapshot(exported.path)
    for name in ("kept", "new") if fault == "hf weight" else ("kept",):
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


def test_what_lies_there_is_not_lost_to_an_export_of_less(exported, tmp_path):
    run = copy_run(exported, tmp_path / "run")
    export(config(run, sub_adapter="maximal", name="both", formats=["hf", "peft"]))
    before = snapshot(run.path)
    with pytest.raises(RunError, match=r"both has peft of this .* be lost; .* \(now hf\)"):
        export(config(run, sub_adapter="maximal", name="both"))
    with pytest.raises(RunError, match=r"both has peft of this"):
        export(config(run, sub_adapter="maximal", name="both", prove=False))
    assert snapshot(run.path) == before
    export(config(run, sub_adapter="minimal", name="both"))  # another one takes the place
    assert not (run.path / "export" / "both" / "peft").exists()


def test_an_export_of_which_nothing_can_be_written_fails(exported):
    before = snapshot(exported.path)
    with pytest.raises(ExportError, match=r"^nothing of minimal can be written so: peft: \w+"):
        export(config(exported, sub_adapter="minimal", formats=["peft"]))
    assert snapshot(exported.path) == before


def test_another_base_is_refused_before_its_weights(exported, tmp_path, tiny_folder, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    run = copy_run(exported, tmp_path / "run")
    settings = yaml.safe_load(run.config_file.read_text())
    settings["model"]["path"] = str(base)
    run.config_file.write_text(yaml.safe_dump(settings))
    load_run(run)  # the same weights in another folder are the same base
    old = digest_of(base)
    tiny.save_tiny(base, seed=1)
    new = digest_of(base)
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("weights were loaded"))
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
def test_what_cannot_be_traced_is_named(exported, monkeypatch, kind, capfd):
    def forward(self, x):
        return torch.special.bessel_j0(x)

    example = untraceable(onnx_decoder._example, monkeypatch, forward)
    monkeypatch.setattr(onnx_decoder, "_example", example)
    before = snapshot(exported.path)
    arguments = ["export", str(exported.path), "--sub_adapter", "maximal", "--name", "kept",
                 "--formats", f"hf,{kind}", "--accuracy", "false", "--timing.rounds", "1",
                 "--timing.max_rounds", "1"]  # fmt: skip
    assert __main__.main(arguments) == 1
    printed, said = capfd.readouterr()
    assert printed == ""  # not the graph, which torch has to say
    assert f"error: {kind}" in said and "LlamaForCausalLM cannot be traced" in said
    assert "hf and peft need no trace" in said
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
     ("openvino", "openvino", "openvino"), ("gguf", "gguf", "gguf")],
)  # fmt: skip
def test_a_missing_runtime_is_named_before_anything_slow(
    exported, monkeypatch, kind, package, extra
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(MissingExtra, match=rf"needs {package}, .*elastic-adapters\[{extra}\]"):
        export(config(exported, sub_adapter="maximal", formats=["hf", kind]))


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
                 "--formats", ",".join({"hf": 0, kind: 0})]  # fmt: skip
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
    assert not (run.path / "export" / "big").exists()
    export(config(run, sub_adapter="minimal", name="other"))
    assert not hidden(run.path)
    assert {path.name for path in (run.path / "export").iterdir()} == {"kept", "other"}
    assert snapshot(run.path / "export" / "kept") == kept


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/tmp/x", ".hidden"])
def test_a_name_is_one_directory(name):
    with pytest.raises(ConfigError, match="without slashes"):
        ExportConfig(name=name)


def test_what_could_not_be_weighed_is_left_out(exported, tmp_path, monkeypatch, capsys):
    run = copy_run(exported, tmp_path / "run")

    def fails(loads):
        raise RunError("hf: killed")

    monkeypatch.setattr(weigh, "weigh", fails)
    report = export(config(run, sub_adapter="maximal", name="unweighed"))
    found = report.contents["formats"]["hf"]
    assert found["memory_mb"] is None and found["full_load_s"] is None
    assert "hf: killed" in capsys.readouterr().err
    report.show()
    assert "- / -" in capsys.readouterr().out


def test_a_model_of_nan_is_not_exported(exported, monkeypatch):
    class Nan(TorchRunner):
        def decode(self, input_ids):
            return super().decode(input_ids) * np.nan

    before = snapshot(exported.path)
    real = probes.probe
    monkeypatch.setattr(targets, "runner_of", Nan)
    made = []

    def honest(*args):
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(probes, "probe", honest)
    with pytest.raises(ExportError, match=r"^hf: its logits are not numbers"):
        export(config(exported, sub_adapter="maximal"))
    assert len(made) == 4 and all(len(p.logits) == NEW_TOKENS for p in made)
    assert snapshot(exported.path) == before
