"""Code that a base's folder names: passed on only where the user trusted it, and then as a copy."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from elastic.config import ModelConfig
from elastic.exporting import card
from elastic.formats import hf, pipelines
from elastic.models import loading
from elastic.models.modules import plain_linear
from tests.exporting.test_card import REPORT
from tests.helpers import tiny

THEIRS = {
    "AutoConfig": "somebody/else--modeling_elastic.Config",
    "AutoModelForCausalLM": "somebody/else--modeling_elastic.Model",
    "AutoTokenizer": ["somebody/else--tokens.Tokenizer", None],
    "AutoProcessor": "modeling_elastic.Processor",
}
NAMED = {"auto_map": THEIRS, "custom_pipelines": {"text": {"impl": "somebody/else--run.Run"}}}
FILES = ("config.json", "tokenizer_config.json", "generation_config.json")


def strange(folder):
    """A tiny model whose every file of settings names code of somebody else's repository."""
    tiny.save_tiny(folder)
    for name in FILES:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | NAMED))
    return folder


def load(folder, trusted: bool = False):
    base = ModelConfig(path=str(folder), dtype="float32", device="cpu", trust_remote_code=trusted)
    return loading.load_model(str(folder), base), loading.load_tokenizer(base)


def named_code(folder) -> dict:
    """By file, the code that it names."""
    found = {}
    for file in folder.glob("*.json"):
        text = file.read_text()
        if "auto_map" in text or "custom_pipelines" in text:
            found[file.name] = json.loads(text).get("auto_map")
    return found


def test_what_is_written_names_no_code_of_anybody_else(tmp_path):
    model, tokenizer = load(strange(tmp_path / "base"))
    assert model.config.auto_map  # as it was read
    hf.write(model, tokenizer, tmp_path / "hf")
    card.write(REPORT, tmp_path / "hf")
    pipelines.companions(model, tokenizer, tmp_path / "onnx", "onnx")
    for name in ("hf", "onnx"):
        assert named_code(tmp_path / name) == {}
        assert (tmp_path / name / "generation_config.json").is_file()
    text = (tmp_path / "hf" / card.FILE).read_text()
    assert "trust_remote_code=True" not in text and "custom_code" not in text


def test_a_folder_with_our_class_names_that_alone(tmp_path):
    model, tokenizer = load(strange(tmp_path / "base"))
    for layer in model.model.layers[1:]:
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            weight = getattr(layer.mlp, name).weight
            layer.mlp.set_submodule(name, plain_linear(weight.narrow(axis, 0, 32), None))
    hf.write(model, tokenizer, tmp_path / "hf")
    ours = {
        "AutoConfig": "modeling_elastic.ElasticLlamaConfig",
        "AutoModelForCausalLM": "modeling_elastic.ElasticLlamaForCausalLM",
    }
    assert named_code(tmp_path / "hf") == {"config.json": ours}
    card.write(REPORT, tmp_path / "hf")
    text = (tmp_path / "hf" / card.FILE).read_text()
    assert "trust_remote_code=True" in text and "in some thirty lines" in text


MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class MineTokenizerFast(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def custom(tmp_path):
    """A folder with classes of its own, and names of somebody else's beside theirs."""
    folder = tiny.save_tiny(tmp_path / "custom")
    (folder / "modeling_mine.py").write_text(MODEL)
    (folder / "tokens_mine.py").write_text(TOKENIZER)
    changes = {
        "config.json": {
            "model_type": "mine", "architectures": ["MineForCausalLM"],
            "auto_map": {
                "AutoConfig": "modeling_mine.MineConfig",
                "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
                "AutoModel": "somebody/else--modeling.Model",
            },
        },
        "tokenizer_config.json": {
            "auto_map": {
                "AutoTokenizer": [None, "tokens_mine.MineTokenizerFast"],
                "AutoProcessor": "somebody/else--process.Processor",
            },
        },
    }  # fmt: skip
    for name, change in changes.items():
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return folder


def test_trusted_code_is_copied_and_named_as_it_lies_there(custom, tmp_path):
    model, tokenizer = load(custom, trusted=True)
    hf.write(model, tokenizer, tmp_path / "hf")
    card.write(REPORT, tmp_path / "hf")
    assert named_code(tmp_path / "hf") == {
        "config.json": {
            "AutoConfig": "modeling_mine.MineConfig",
            "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
        },
        "tokenizer_config.json": {"AutoTokenizer": [None, "tokens_mine.MineTokenizerFast"]},
    }
    loaded = hf.load(tmp_path / "hf", torch.float32, trust_remote_code=True)
    assert torch.equal(tiny.logits(loaded, tiny.tokens()), tiny.logits(model, tiny.tokens()))
    tokens = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert type(tokens).__name__ == "MineTokenizerFast"
    text = (tmp_path / "hf" / card.FILE).read_text()
    assert "trust_remote_code=True" in text and "is the base model's" in text
    assert "modeling_elastic" not in text
