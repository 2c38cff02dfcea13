"""GGUF files as base models: read as what they were written from, or refused."""

import sys

import pytest
import torch

from elastic.config import ModelConfig
from elastic.errors import MissingExtra, ModelError
from elastic.formats import gguf
from elastic.models import loading
from elastic.models.packaged import cache_directory
from tests.formats.test_gguf import LLAMA3, TOKENIZER, models_of
from tests.helpers import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))


def written(folder, family="llama", name="mine.gguf", **overrides):
    """(model, its file)."""
    model, _ = models_of(family, **overrides)
    file = gguf.write(model, TOKENIZER, folder, type="f32")
    return model, file.rename(folder / name)


def settings(file) -> ModelConfig:
    return ModelConfig(path=str(file), dtype="float32", device="cpu")


@pytest.mark.parametrize("family", ["llama", "llama, tied", "qwen2"])
def test_a_file_is_the_model_that_it_was_written_from(tmp_path, family):
    model, file = written(tmp_path, family)
    base = loading.load(settings(file))
    ids = torch.arange(3, 12)[None]
    expected = tiny.logits(model, ids)
    gap = (tiny.logits(base.model, ids) - expected).abs().max() / expected.abs().max()
    assert gap < 1e-5
    text = "Tom's 12 apples"
    assert base.tokenizer(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loading.skeleton(settings(file)).config.hidden_size == 96


def test_without_the_library_a_file_is_refused_and_a_folder_made_before_serves(
    tmp_path, monkeypatch
):
    (tmp_path / "other").mkdir()
    (_, made), (_, new) = (written(folder) for folder in (tmp_path, tmp_path / "other"))
    digest = loading.load(settings(made)).digest
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert loading.load(settings(made)).digest == digest
    with pytest.raises(MissingExtra, match=r"mine\.gguf needs gguf, .*elastic-adapters\[gguf\]"):
        loading.locate(str(new))


def test_a_file_becomes_a_folder_once_and_again_when_it_has_changed(tmp_path, capsys):
    _, file = written(tmp_path)
    first = loading.load(settings(file))
    assert "Converting mine.gguf once, into" in capsys.readouterr().err
    assert loading.load(settings(file)).digest == first.digest
    assert "Converting" not in capsys.readouterr().err
    file.unlink()
    _, file = written(tmp_path, "qwen2")
    assert loading.load(settings(file)).model.config.model_type == "qwen2"
    assert len(list(cache_directory().iterdir())) == 2


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("mine.gguf", lambda old: b"{}", "not a GGUF file"),
        ("mine.gguf", lambda old: b"GGUF", "damaged, or cut off"),
        ("mine.gguf", lambda old: old[: len(old) // 2], "damaged, or cut off"),
        ("mine.gguf", lambda old: old.replace(b"llama", b"lxxma"), "with architecture lxxma"),
        ("mine.gguf", lambda old: old.replace(b"blk.2.ffn_up", b"blk.2.ffn_xx"), "no weights in"),
        ("m-00001-of-00002.gguf", lambda old: old, "one part of .* --merge FIRST.gguf WHOLE.gguf"),
    ],
)
def test_what_cannot_be_read_whole_is_refused_in_one_line(tmp_path, name, change, message):
    _, file = written(tmp_path, name=name)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ModelError, match=message) as caught:
        loading.load(settings(file))
    assert str(caught.value).startswith(f"model.path {file}: ")
    assert "\n" not in str(caught.value)
    assert not any(cache_directory().glob("*"))


def test_scaled_positions_are_refused_rather_than_lost(tmp_path):
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    for scaling, where in ((LLAMA3, "rope_freqs"), (linear, "rope.scaling.type")):
        _, file = written(tmp_path, rope_parameters=scaling)
        with pytest.raises(ModelError, match=rf"{where}.*, which transformers does not read"):
            loading.load(settings(file))


def test_a_folder_of_such_files_names_one(tmp_path):
    _, file = written(tmp_path)
    with pytest.raises(ModelError, match=f"no config.json there; give a model folder, or {file}$"):
        loading.load(settings(tmp_path))
