"""What lies in a Hugging Face folder, beside what loading it shows."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    FalconH1Config,
    FalconH1ForCausalLM,
)

from elastic.errors import ExportError
from elastic.formats import hf
from elastic.formats.auto_class import auto_of
from elastic.formats.padding import padded
from elastic.models.modules import as_cut_, plain_linear
from elastic.supernet.compact import compact
from tests.formats.test_nemotron_nas import cut
from tests.formats.test_nemotron_nas import net_of as wide_net_of
from tests.helpers import tiny
from tests.helpers.families import LLAMA3, model_of, net_of
from tests.helpers.laws import close, mixed
from tests.zoo import building as zoo


def stored(folder) -> dict[str, str]:
    """File by name of tensor, in all files of weights."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                assert name not in found
                found[name] = file.name
    return found


@pytest.mark.parametrize("form", ["mixed", "padded"])
@pytest.mark.parametrize("size", ["50GB", "20KB"])
def test_weights_are_there_once_in_one_file_or_several(form, size, tmp_path):
    """Of a model whose head is its embedding."""
    net = net_of("llama, tied")
    chosen = net.space.minimal().as_dict()
    chosen[next(group.name for group in net.space if group.dim == "width")] = 128
    sub = net.space.check(type(net.space.minimal())(tuple(chosen.items())))
    model = compact(net, sub)
    if form == "padded":
        model = padded(model, net.space, sub)
    hf.write(model, tiny.tokenizer(), tmp_path, max_shard_size=size)
    names = stored(tmp_path)
    own = {name for name, _ in model.named_parameters()}  # a tie has one name
    assert names.keys() == own and "lm_head.weight" not in own
    files = {file.name for file in tmp_path.glob("*.safetensors")}
    bytes_ = sum((tmp_path / file).stat().st_size for file in files)
    assert bytes_ < sum(p.nbytes for p in model.parameters()) + 4000 * len(files)
    if size == "20KB":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == names and len(files) > 3
    else:
        assert files == {"model.safetensors"}
    again = hf.load(tmp_path, torch.float64)
    ids = tiny.tokens()
    assert torch.equal(tiny.logits(again, ids), tiny.logits(model, ids))
    assert (tmp_path / "generation_config.json").is_file()


def test_a_tokenizer_is_written_in_words_of_transformers_4(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    hf.write_tokenizer(tokenizer, tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert saved["additional_special_tokens"] == ["<|turn|>"]
    assert "extra_special_tokens" not in saved


@pytest.mark.parametrize(
    "family, rope, words",
    [
        ("llama", {"rope_type": "default", "rope_theta": 500.0}, {"rope_theta": 500.0}),
        ("llama", LLAMA3, {"rope_theta": 500.0, "rope_scaling": {
            key: value for key, value in LLAMA3.items() if key != "rope_theta"}}),
        ("gpt-neox", {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
         {"rotary_emb_base": 500.0, "rotary_pct": 0.5}),
    ],
)  # fmt: skip
def test_rotary_settings_are_where_transformers_4_looks(family, rope, words, tmp_path):
    """And transformers 5 reads the same from both."""
    model = model_of(family, torch.float32, rope_parameters=dict(rope))
    hf.write(model, None, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {key: saved[key] for key in words} == words
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    kept = again.config.rope_parameters
    assert {key: kept[key] for key in rope} == rope
    ids = tiny.tokens()
    assert torch.equal(tiny.logits(again, ids), tiny.logits(model, ids))


def test_uneven_layers_of_a_class_that_a_folder_brings_are_refused(monkeypatch):
    """The class that rebuilds them derives from one of transformers' own."""
    net = net_of("llama")
    even, uneven = compact(net, net.space.minimal()), compact(net, mixed(net))
    assert hf.why_not(even) is hf.why_not(uneven) is None
    monkeypatch.setattr(type(even), "_auto_class", "AutoModelForCausalLM")
    assert hf.why_not(even) is None
    assert "LlamaForCausalLM" in hf.why_not(uneven) and "hf.padded true" in hf.why_not(uneven)


def test_one_word_that_says_two_sizes_is_not_changed_for_one_of_them(tmp_path):
    """HunYuan's experts, which are no linear layers, are as wide as the MLP beside them."""
    model = zoo.model_of(zoo.config_of("hunyuan_v1_moe", "causal"), "causal", torch.float32)
    for layer in model.model.layers:
        mlp = layer.mlp.shared_mlp
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            weight = getattr(mlp, name).weight
            mlp.set_submodule(name, plain_linear(weight.narrow(axis, 0, 48), None))
    hf.write(model, None, tmp_path)
    loaded = hf.load(tmp_path, torch.float32)
    assert loaded.config.intermediate_size == 96 and (tmp_path / hf.CODE).is_file()
    close(tiny.logits(loaded, tiny.tokens()), tiny.logits(model, tiny.tokens()), 1e-6)


def test_the_stack_below_a_head_is_the_family_s_own(tmp_path):
    """transformers asks AutoModel for it, which is told of the small class's configuration."""
    model = model_of("llama, classes", torch.float32)
    layer = model.model.layers[1]
    layer.mlp.set_submodule("up_proj", plain_linear(layer.mlp.up_proj.weight[:96], None))
    layer.mlp.set_submodule("gate_proj", plain_linear(layer.mlp.gate_proj.weight[:96], None))
    layer.mlp.set_submodule("down_proj", plain_linear(layer.mlp.down_proj.weight[:, :96], None))
    hf.write(model, None, tmp_path)
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
    again = as_cut_(found)
    assert [type(again), type(again.model)] == [type(model), type(model.model)]
    assert again.model.config is again.config and type(again.config) is type(model.config)


@pytest.mark.parametrize(
    "name, auto",
    [("MarianMTModel", "AutoModelForSeq2SeqLM"), ("BertGenerationDecoder", "AutoModelForCausalLM"),
     ("ReformerModelWithLMHead", "AutoModelForCausalLM")],
)  # fmt: skip
def test_a_class_without_the_usual_ending_has_its_auto_class(name, auto):
    assert auto_of(name) == auto_of(f"Elastic{name}") == auto
    with pytest.raises(ExportError, match=f"{name}2 is not known"):
        auto_of(f"{name}2")


def test_buffers_that_are_in_no_file_are_filled_when_it_loads(tmp_path):
    """Falcon-H1 fills its multipliers from the configuration, where a model begins."""
    config = FalconH1Config(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4,
        mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8,
        ssm_multipliers=[0.5, 0.25, 2.0, 4.0, 0.125], initializer_range=0.3, pad_token_id=tiny.PAD,
    )  # fmt: skip
    torch.manual_seed(0)
    model = FalconH1ForCausalLM(config).eval().requires_grad_(False)
    mlp = model.model.layers[1].feed_forward
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        mlp.set_submodule(name, plain_linear(getattr(mlp, name).weight.narrow(axis, 0, 32), None))
    hf.write(model, None, tmp_path)
    assert (tmp_path / hf.CODE).is_file()
    torch.empty(4096).fill_(torch.nan)  # memory that is handed out again is not zero by luck
    loaded = hf.load(tmp_path, torch.float32)
    for (name, buffer), (_, expected) in zip(
        loaded.named_buffers(), model.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, expected), name
    close(tiny.logits(loaded, tiny.tokens()), tiny.logits(model, tiny.tokens()), 1e-6)


HEADS = {"heads": [4, 2, 1], "query_heads": [2, 1, 2]}


@pytest.mark.parametrize(
    "family, heads, words",
    [
        ("llama", {}, {"1": {"intermediate_size": 300}, "2": {"intermediate_size": 100}}),
        ("llama", HEADS, None),  # its configuration asks for one number of heads
        ("qwen2", HEADS, {
            "1": {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 300},
            "2": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 100},
        }),
        ("qwen2", {"heads": [4, 3, 4]}, {
            "1": {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 300},
            "2": {"intermediate_size": 100},
        }),
    ],
)  # fmt: skip
def test_sizes_by_layer_stand_in_the_words_of_transformers_too(family, heads, words, tmp_path):
    """Whoever builds a layer from what is said of it gets its sizes."""
    model = cut(wide_net_of(family), mlp_width=[768, 300, 100], **heads)
    hf.write(model, tiny.tokenizer(), tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.get("per_layer_config") == words and saved["linear_sizes"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    ids = tiny.tokens()
    assert torch.equal(tiny.logits(loaded, ids), tiny.logits(model, ids))
    assert loaded.config.is_heterogeneous == (words is not None)
    if words is not None:
        for number, layer in enumerate(model.model.layers):
            built = type(layer)(loaded.config.per_layer_config[number], number)
            shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
            assert shapes == {name: tensor.shape for name, tensor in layer.state_dict().items()}
    answers = [
        each.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True, **settings)
        for each, settings in (
            (model, {}), (loaded, {}), (loaded, {"cache_implementation": "static"})
        )
    ]  # fmt: skip
    assert all(torch.equal(answers[0], other) for other in answers[1:])
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again.get("per_layer_config") == words
    as_cut = hf.load(tmp_path / "again", torch.float32)
    assert not as_cut.config.is_heterogeneous and as_cut.config.intermediate_size == 768
    assert torch.equal(tiny.logits(as_cut, ids), tiny.logits(model, ids))


def test_a_class_of_transformers_does_not_build_layers_from_them_yet(tmp_path):
    """As docs/guides/export.md says; when it does, folders need no class of their own."""
    hf.write(cut(wide_net_of("llama"), mlp_width=[768, 300, 100]), None, tmp_path)
    file = tmp_path / "config.json"
    words = json.loads(file.read_text()) | {"model_type": "llama"}
    for name in ("linear_sizes", "attention_sizes", "auto_map", "architectures"):
        del words[name]
    file.write_text(json.dumps(words))
    with pytest.raises(RuntimeError, match=r"'intermediate_size' is a per-layer attribute"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["t5", "bert, classes", "bloom"])
def test_where_those_words_do_not_say_all_sizes_there_are_none(family, tmp_path):
    net = net_of(family)
    hf.write(compact(net, mixed(net)), None, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "linear_sizes" in saved and "per_layer_config" not in saved
