"""Base models as folders say them: loaded, known by their digest, and named when unreadable."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import filter_repo_objects

from elastic import __main__
from elastic.config import ModelConfig
from elastic.errors import ModelError
from elastic.models import loading
from elastic.models.digest import digest_of
from tests.helpers import tiny
from tests.helpers.tiny import RANK


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_tiny_model_loads_as_any_base_does(tmp_path, tied):
    folder = tiny.save_tiny(tmp_path / "tiny", tie_word_embeddings=tied)
    settings = ModelConfig(path=str(folder), dtype="float32", device="cpu")
    base = loading.load(settings)
    assert base.digest == digest_of(folder)
    text = "Tom has 3 pens, then finds 12. How many?"
    assert base.tokenizer(text)["input_ids"] == tiny.tokenizer()(text)["input_ids"]
    assert base.tokenizer.decode(base.tokenizer(text)["input_ids"]) == "<bos>" + text
    assert len(base.tokenizer) == base.model.config.vocab_size == tiny.VOCABULARY
    expected = tiny.llama(dtype=torch.float32, tie_word_embeddings=tied).lm_head.weight
    assert torch.equal(base.model.lm_head.weight, expected)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    bare = loading.skeleton(settings)
    assert next(bare.parameters()).is_meta
    assert tiny.space().bind(bare, RANK) == tiny.space().bind(base.model, RANK)


def test_a_skeleton_knows_what_ends_what_it_generates(tmp_path):
    folder = tiny.save_tiny(tmp_path / "tiny")
    settings = ModelConfig(path=str(folder), device="cpu")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert loading.skeleton(settings).generation_config.eos_token_id == [1, 7]
    file.unlink()
    model = loading.skeleton(settings)
    assert model.generation_config.eos_token_id == model.config.eos_token_id


def test_the_digest_knows_weights_not_files(tmp_path):
    folder = tiny.save_tiny(tmp_path / "one")
    whole = digest_of(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    split = tmp_path / "two"
    split.mkdir()
    names = list(tensors)
    for part, chosen in enumerate((names[::2], names[1::2])):
        safetensors.torch.save_file({n: tensors[n] for n in chosen}, split / f"{part}.safetensors")
    assert digest_of(split) == whole
    changed = copy.deepcopy(tensors)
    changed[names[0]].view(-1)[0] += 1e-3
    safetensors.torch.save_file(changed, folder / "model.safetensors")
    assert digest_of(folder) != whole


def says(**settings) -> Callable[[bytes], bytes]:
    """What config.json says, with these settings."""
    return lambda old: json.dumps(json.loads(old) | settings).encode()


CODE = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("config.json", says(**CODE), "read that, then give --model.trust_remote_code true"),
        ("config.json", says(model_type="mine"), r"type `mine` .*; give a model that transformers"),
        ("config.json", says(model_type="vit"), "ViTConfig.*; give a model that transformers"),
        ("config.json", says(hidden_size="x"), "'hidden_size' expected int"),
        ("config.json", says(architectures=[None]), "architectures is .None., no list of names"),
        ("config.json", lambda old: old[:20], "not a valid JSON file"),
        ("config.json", lambda old: b"\xff", "not a valid JSON file"),
        ("config.json", says(hidden_size=48), "mismatched.*fetch or save the model again"),
        ("model.safetensors", lambda old: old[: len(old) // 2], "fetch or save the model again"),
        ("model.safetensors", lambda old: b"", "fetch or save the model again"),
        ("tokenizer.json", lambda old: b"{", "the tokenizer cannot be loaded: .*fetch or save"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_read_is_named(tmp_path, capsys, name, change, message):
    folder = tiny.save_tiny(tmp_path / "base")
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(ModelError, match=f"^model.path {re.escape(str(folder))}: .*{message}"):
        loading.skeleton(ModelConfig(path=str(folder)))
        loading.load(ModelConfig(path=str(folder), dtype="float32", device="cpu"))
    assert __main__.main(["train", str(tmp_path / "run"), "--model.path", str(folder)]) == 1
    assert f"error: model.path {folder}: " in capsys.readouterr().err


def test_pickled_weights_are_never_read(tmp_path):
    """Which could run anything; nor is an adapter taken for a base, which may name another."""
    folder = tiny.save_tiny(tmp_path / "base")
    settings = ModelConfig(path=str(folder), dtype="float32", device="cpu")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(ModelError, match=r"it is an adapter; give its base"):
        loading.load(settings)
    (folder / "adapter_config.json").unlink()
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"),
               folder / "pytorch_model.bin")  # fmt: skip
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors weights \(pickled weights are not"):
        loading.load(settings)
    (folder / "other.safetensors").write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    with pytest.raises(ModelError, match="the weights cannot be loaded"):
        loading.load(settings)


def test_a_gated_model_says_where_access_is_asked_for(monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise GatedRepoError("401", response=Mock(headers={}))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=r"^model.path 'meta/big': .*ask at https://.*HF_TOKEN$"):
        loading.skeleton(ModelConfig(path="meta/big"))


def test_a_chat_template_is_fetched_from_the_hub(tmp_path, monkeypatch):
    there, here = tiny.save_tiny(tmp_path / "there"), tmp_path / "here"
    (there / "chat_template.jinja").write_text("{{ messages }}")

    def snapshot_download(name, allow_patterns):
        here.mkdir(exist_ok=True)
        names = [file.name for file in there.iterdir()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(there / name, here)
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = loading.load_tokenizer(ModelConfig(path="meta/big"))
    assert found.chat_template == "{{ messages }}"


@pytest.mark.parametrize("length", [0, 5, 100, 2000])
def test_a_digest_of_what_was_cut_off_names_the_file(tmp_path, length):
    file = tiny.save_tiny(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:length], b"\xff" * length, whole[:-1]):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match=rf"^{re.escape(str(file))}: .*fetch or save"):
            digest_of(tmp_path)
