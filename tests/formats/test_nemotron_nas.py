"""The layout of NVIDIA's Puzzle models: read back by its own rule, and run by mlx-lm itself."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from elastic.errors import ExportError
from elastic.formats import nemotron_nas
from elastic.models.ties import settle_ties_, untie_
from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import LLAMA3, model_of

SIZES = {"hidden_size": 128, "intermediate_size": 768, "num_hidden_layers": 3,
         "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}  # fmt: skip
BIASES = {"attention_bias": True, "mlp_bias": True}
FAMILIES = [
    ("llama", {}),
    ("llama", BIASES),
    ("llama, tied", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
]


def net_of(family: str, **overrides) -> Supernet:
    model = model_of(family, torch.float32, **(SIZES | overrides))
    declared = SearchSpace.load("llama-deep").as_dict()
    declared["groups"] |= {
        "mlp_width": {
            "dim": "width", "outputs": tiny.GATE_UP, "inputs": ["mlp.down_proj"],
            "choices": [768, 512, 300, 100],
        },
        "heads": {
            "dim": "heads", "outputs": tiny.ATTENTION, "inputs": ["self_attn.o_proj"],
            "choices": [4, 3, 2, 1],
        },
    }  # fmt: skip
    net = Supernet(model, SearchSpace.from_dict(declared), tiny.ADAPTERS["lora"])
    return tiny.randomize_(net)


def cut(net: Supernet, depth: int = 3, **chosen: list[int]):
    """The full size but for these sizes, block by block."""
    sizes = net.space.maximal().as_dict() | {"model.layers.*.depth": depth}
    for name, values in chosen.items():
        sizes |= {f"model.layers.{block}.{name}": size for block, size in enumerate(values)}
    return compact(net, SubAdapter(tuple(sizes.items())))


UNEVEN = {"mlp_width": [768, 300, 100], "heads": [3, 2, 1], "query_heads": [2, 1, 2]}


def written(model, folder, **settings) -> dict:
    nemotron_nas.write(model, tiny.tokenizer(), folder, **settings)
    return json.loads((folder / "config.json").read_text())


def gap(found, model) -> float:
    """In parts of the largest logit."""
    ids = tiny.tokens()
    expected = tiny.logits(model, ids)
    return float((tiny.logits(found, ids) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family, overrides", FAMILIES)
def test_a_llama_of_the_sizes_that_are_written_computes_the_same(family, overrides, tmp_path):
    net = net_of(family, **overrides)
    for name, model in {
        "uneven": cut(net, **UNEVEN),
        "fewer blocks": cut(net, depth=2, mlp_width=[300, 768, 512]),
        "full": cut(net),
    }.items():
        assert nemotron_nas.why_not(model) is None
        words = written(model, tmp_path / name)
        assert len(words["block_configs"]) == words["num_hidden_layers"] == len(model.model.layers)
        assert gap(nemotron_nas.load(tmp_path / name), model) < 1e-5, name
        nemotron_nas.check(tmp_path / name, model)


def test_sizes_are_said_as_the_classes_read_them(tmp_path):
    """Of 8 query heads, 4 key-value heads and MLPs of 768."""
    model = cut(net_of("llama"), **UNEVEN)
    words = written(model, tmp_path)
    assert words["architectures"] == ["DeciLMForCausalLM"]
    assert words["model_type"] == "nemotron-nas" and words["num_attention_heads"] == 8
    usual = {"no_op": False, "replace_with_linear": False}
    # 3 key-value heads need the place of 4; 2 with one query head each leave 6 of them empty.
    assert words["block_configs"] == [
        {"attention": {**usual, "n_heads_in_group": 2}, "ffn": {**usual, "ffn_mult": 9.0}},
        {"attention": {**usual, "n_heads_in_group": 4}, "ffn": {**usual, "ffn_mult": 6.0}},
        {"attention": {**usual, "n_heads_in_group": 8}, "ffn": {**usual, "ffn_mult": 3.0}},
    ]
    state = load_file(tmp_path / "model.safetensors")
    for block, (width, keys) in enumerate([(768, 4), (512, 2), (256, 1)]):
        assert state[f"model.layers.{block}.mlp.up_proj.weight"].shape == (width, 128)
        assert state[f"model.layers.{block}.self_attn.k_proj.weight"].shape == (keys * 16, 128)
        assert state[f"model.layers.{block}.self_attn.o_proj.weight"].shape == (128, 128)
    extra = (212 + 156) * 3 * 128 + (2 + 6 + 6) * 2 * 16 * 128 + 1 * 2 * 16 * 128
    assert nemotron_nas.padding(model) == nemotron_nas.Padding(368, 14, 1, extra)
    assert nemotron_nas.cannot(model) == {
        "SGLang": "it wants as many key-value heads in every block"
    }


@pytest.mark.parametrize("hidden", [64, 576, 896, 2048, 4096, 5120, 7168])
def test_every_width_is_said_to_six_digits(hidden):
    for width in range(256, 65537, 256):
        nemotron_nas._words(nemotron_nas.Block(4, width), hidden)


def test_heads_that_are_narrower_than_the_hidden_states_get_empty_ones_beside_them(tmp_path):
    """As in Mistral-Nemo: 8 heads of 16 channels, hidden states of 160."""
    model = cut(net_of("llama", hidden_size=160), **UNEVEN)
    assert written(model, tmp_path)["num_attention_heads"] == 10
    nemotron_nas.check(tmp_path, model)


def test_programs_get_blocks_as_objects(tmp_path):
    words = written(cut(net_of("llama"), **UNEVEN), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert [block.attention.n_heads_in_group for block in config.block_configs] == [2, 4, 8]
    block = config.block_configs[1]
    assert block.ffn.ffn_mult == 6.0 and not block.ffn.no_op
    assert not hasattr(block.ffn, "intermediate_size") and not hasattr(block.ffn, "hidden_act")
    assert json.loads(config.to_json_string())["block_configs"] == words["block_configs"]


def test_what_is_rounded_and_what_is_untied_is_read_back_too(tmp_path):
    model = cut(net_of("llama, tied"), **UNEVEN)
    untie_(model)
    model.lm_head.weight.data.mul_(2)
    settle_ties_(model)
    words = written(model, tmp_path, dtype=torch.bfloat16, max_shard_size="100KB")
    assert words["dtype"] == "bfloat16" and words["tie_word_embeddings"] is False
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    nemotron_nas.check(tmp_path, model)
    with pytest.raises(ExportError, match=r"lm_head.weight is not what was written"):
        model.lm_head.weight.data.mul_(2)
        nemotron_nas.check(tmp_path, model)


def test_a_folder_that_says_something_else_is_refused(tmp_path):
    model = cut(net_of("llama"), **UNEVEN)
    words = written(model, tmp_path)
    file, tensors = tmp_path / "config.json", load_file(tmp_path / "model.safetensors")
    file.write_text(json.dumps(words | {"rms_norm_eps": 0.1}))
    with pytest.raises(ExportError, match=r"computes logits that differ by"):
        nemotron_nas.check(tmp_path, model)
    words["block_configs"][0]["ffn"]["ffn_mult"] = 6.0
    file.write_text(json.dumps(words))
    with pytest.raises(ExportError, match=r"size mismatch for model.layers.0.mlp.gate_proj"):
        nemotron_nas.check(tmp_path, model)
    words["block_configs"][0]["ffn"]["ffn_mult"] = 9.0
    file.write_text(json.dumps(words))
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"Missing key.*model.norm.weight"):
        nemotron_nas.check(tmp_path, model)


@pytest.mark.parametrize(
    "family, overrides, reason",
    [
        ("gpt2", {}, "GPT2LMHeadModel is no model of Llama's layers"),
        ("qwen3", {}, "Qwen3ForCausalLM is no model of Llama's layers"),
        ("mistral", {"sliding_window": 4}, "sliding window"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
        ("llama", {"hidden_size": 72}, "together as wide as the hidden states, 72 channels"),
        ("llama", {"head_dim": 32}, "4 heads of 32 are not"),
    ],
)
def test_what_the_layout_does_not_hold_is_said(family, overrides, reason, tmp_path):
    model = model_of(family, torch.float32, **overrides)
    assert reason in nemotron_nas.why_not(model)
    with pytest.raises(ExportError, match=r"^nemotron_nas: "):
        nemotron_nas.write(model, None, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_classes_without_biases_are_named():
    net = net_of("llama", **BIASES)
    assert "biases in the MLP" in nemotron_nas.cannot(cut(net))["SGLang"]
    assert nemotron_nas.cannot(cut(net_of("qwen2"))) == {"TensorRT-LLM": "its class has no biases"}
    assert nemotron_nas.cannot(cut(net_of("llama"))) == {}


# mlx-lm itself.


@pytest.mark.slow
@pytest.mark.parametrize("family, overrides", FAMILIES)
def test_mlx_lm_computes_the_same(family, overrides, tmp_path):
    """With its cache: a prompt, then one token after another."""
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model = cut(net_of(family, **overrides), **UNEVEN)
    written(model, tmp_path)
    found, _ = load_model(tmp_path)
    assert type(found).__module__ == "mlx_lm.models.nemotron-nas"
    ids = tiny.tokens(1, 24)
    cache = make_prompt_cache(found)
    parts = [ids[:, :20], *ids[:, 20:].split(1, dim=1)]
    steps = [found(mx.array(part.tolist()), cache=cache) for part in parts]
    logits = torch.tensor(mx.concatenate(steps, axis=1).tolist())
    expected = tiny.logits(model, ids)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
