"""What the export command writes beside the plain formats: fewer bits, llama.cpp's files, one size
for all layers."""

import json

import pytest
import torch

from elastic import __main__
from elastic.config import CompensationConfig, ExportConfig, HfConfig
from elastic.errors import ConfigError
from elastic.exporting.command import export
from elastic.files import write_json
from elastic.formats import hf, nemotron_nas
from elastic.run import Run
from elastic.spaces.bound import SubAdapter
from elastic.supernet.store import load_run
from tests.helpers import tiny
from tests.helpers.tiny_runs import ONE_ROUND


def config(run: Run, **overrides) -> ExportConfig:
    settings = dict(formats=["hf"], accuracy=False, timing=ONE_ROUND, runtime_examples=4)
    return ExportConfig(run=str(run.path), **(settings | overrides))


def uneven(run: Run, file) -> str:
    """Full ranks, and MLPs of two widths."""
    net = load_run(run)[2]
    widths = iter((48, 16))
    chosen = {
        group.name: next(widths) if group.dim == "width" else group.choices[0]
        for group in net.space
    }
    write_json(file, chosen)
    return str(file)


def test_graphs_with_fewer_bits_beside_themselves(run, tmp_path, capsys):
    pytest.importorskip("nncf")
    asked = config(run, sub_adapter=uneven(run, tmp_path / "u.json"), name="compressed",
                   formats=["onnx", "openvino"], compress=["int8", "nf4"])  # fmt: skip
    report = export(asked)
    formats = report.contents["formats"]
    assert list(formats) == ["onnx", "onnx-int8", "onnx-nf4", "openvino", "openvino-int8",
                             "openvino-nf4"]  # fmt: skip
    assert "for openvino alone" in formats["onnx-nf4"]["skipped"]
    for name in ("onnx-int8", "openvino-int8", "openvino-nf4"):
        found, whole = formats[name], formats[name.partition("-")[0]]
        about = found["compression"]
        assert about["mode"] == name.partition("-")[2] and about["bytes"] < about["bytes_before"]
        # Random weights are what 4 bits fit worst.
        limit = 0.3 if name.endswith("int8") else 1.0
        assert 0 < found["max_abs_diff"] < limit * found["largest_logit"], name
        assert found["max_abs_diff"] > 10 * whole["max_abs_diff"]  # it did round
        assert found["accuracy_n"] == 4 and len(found["texts"]) == 3
        assert found["deployed"]["precision"].startswith(about["mode"])
        assert (report.directory / name / "tokenizer.json").is_file()
        assert json.loads((report.directory / name / "compression.json").read_text()) == about
    report.show()
    assert "openvino-int8" in capsys.readouterr().out
    assert "openvino-int8" in (report.directory / "report.md").read_text()


def test_compressing_needs_a_graph_and_a_known_mode(run, capsys):
    with pytest.raises(ConfigError, match=r"compress int8: .* add onnx or openvino to formats"):
        config(run, compress=["int8"])
    assert __main__.main(["export", str(run.path), "--compress", "int9"]) != 0
    assert "did you mean 'int8'" in capsys.readouterr().err


def test_a_file_for_llama_cpp_is_read_back_and_said_to_be_unproved(run, tmp_path, capsys):
    asked = config(run, sub_adapter=uneven(run, tmp_path / "u.json"), formats=["hf", "gguf"])
    report = export(asked)
    found = report.contents["formats"]["gguf"]
    if "skipped" in found:  # the tiny tokenizer is none of llama.cpp's
        assert "tokenizer" in found["skipped"]
    report.show()
    assert "gguf: " in capsys.readouterr().out


def test_the_layout_of_puzzle_models_says_what_zeros_fill_up(run, tmp_path):
    file = uneven(run, tmp_path / "u.json")
    report = export(config(run, sub_adapter=file, formats=["hf", "nemotron_nas"], name="nas"))
    found = report.contents["formats"]["nemotron_nas"]
    # MLPs of 48 and 16 channels become 256 wide, each of three rows of 32.
    assert found["padding"] == {
        "mlp_channels": 448, "query_heads": 0, "key_value_heads": 0, "params": 448 * 3 * 32
    }  # fmt: skip
    assert found["pipelines"] == {} and "nothing here runs it" in found["unproved"]
    folder = report.directory / "nemotron_nas"
    one, other = hf.load(report.directory / "hf", torch.float32), nemotron_nas.load(folder)
    ids = tiny.tokens()
    torch.testing.assert_close(tiny.logits(one, ids), tiny.logits(other, ids), atol=1e-4, rtol=0)
    share = 448 * 3 * 32 / report.contents["params"]
    told = f"zeros fill up 448 MLP channels of all blocks together: {share:.1%} more parameters"
    assert told in (report.directory / "report.md").read_text()


def test_a_padded_folder_is_plain_and_the_same_function(run, tmp_path):
    file = uneven(run, tmp_path / "u.json")
    own = export(config(run, sub_adapter=file, name="own"))
    padded = export(config(run, sub_adapter=file, name="padded", hf=HfConfig(padded=True)))
    assert (own.directory / "hf" / hf.CODE).is_file()
    assert not (padded.directory / "hf" / hf.CODE).exists()
    assert padded.contents["formats"]["hf"]["bytes"] > own.contents["formats"]["hf"]["bytes"]
    ids = tiny.tokens()
    one, other = (hf.load(each.directory / "hf", torch.float32) for each in (own, padded))
    torch.testing.assert_close(tiny.logits(one, ids), tiny.logits(other, ids), atol=1e-4, rtol=0)


def test_the_nearest_uniform_sub_adapter_says_what_it_costs(run, tmp_path, capsys):
    file = uneven(run, tmp_path / "uneven.json")
    asked = config(run, sub_adapter=file, hf=HfConfig(uniform=True), accuracy=True)
    report = export(asked)
    contents = report.contents
    space = load_run(run)[2].space
    written = SubAdapter(tuple(contents["sub_adapter"].items()))
    assert report.directory.name == "uneven-uniform" and tiny.is_uniform(space, written)
    assert not tiny.is_uniform(space, SubAdapter.read(file))
    before = contents["instead_of"]
    assert before["sub_adapter"] == SubAdapter.read(file).as_dict()
    assert before["params"] == contents["params"]  # 48 + 16 = 32 + 32
    assert before["accuracy_n"] == contents["accuracy_n"] == 8
    assert not (report.directory / "hf" / hf.CODE).exists()
    report.show()
    assert "One size for all layers; uneven" in capsys.readouterr().out.replace("\n", " ")


def test_a_folder_has_a_card_that_says_how_to_load_it(run):
    report = export(config(run, sub_adapter="minimal"))
    text = (report.directory / "hf" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "AutoModelForCausalLM.from_pretrained(folder)" in text
    assert f"{report.contents['params'] / 1e6:.1f} M of" in text
    files = [file for file in (report.directory / "hf").rglob("*") if file.is_file()]
    assert report.contents["formats"]["hf"]["bytes"] == sum(f.stat().st_size for f in files)


def test_what_is_only_written_is_what_is_proved(run, tmp_path):
    file = uneven(run, tmp_path / "uneven.json")
    half = CompensationConfig(degrees=[0.5], sequential=False)
    asked = dict(sub_adapter=file, hf=HfConfig(max_shard_size="20KB"), compensation=half)
    proved = export(config(run, name="proved", **asked))
    only = export(config(run, name="only", prove=False, **asked))
    for name in ("params", "macs", "full_params", "full_macs", "sub_adapter", "base_digest"):
        assert only.contents[name] == proved.contents[name], name
    files = {file.name for file in (proved.directory / "hf").iterdir()}
    assert files == {file.name for file in (only.directory / "hf").iterdir()}
    assert sum(name.endswith(".safetensors") for name in files) > 2
    for name in files - {"README.md"}:
        assert (proved.directory / "hf" / name).read_bytes() == (
            only.directory / "hf" / name
        ).read_bytes(), name
    assert "neither loaded again" in (only.directory / "report.md").read_text()
    text = (only.directory / "hf" / "README.md").read_text()
    assert "## Quality" not in text and "Accuracy" not in text


@pytest.mark.parametrize("settings", [
    {"formats": ["hf", "onnx"]}, {"hf": HfConfig(padded=True)}, {"hf": HfConfig(uniform=True)},
])  # fmt: skip
def test_only_a_plain_folder_is_written_unproved(run, settings):
    with pytest.raises(ConfigError, match=r"prove false writes .* --formats hf"):
        config(run, prove=False, **settings)
    with pytest.raises(ConfigError, match=r"hf.max_shard_size '500B'.* such as 5GB"):
        config(run, hf=HfConfig(max_shard_size="500B"))
