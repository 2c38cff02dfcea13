"""GGUF files: read back tensor by tensor, by transformers, and run by llama.cpp itself."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Split
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
)

from elastic.errors import ExportError, RunError
from elastic.files import new_directory
from elastic.formats import gguf, gguf_tokenizer
from elastic.formats.text_only import as_text
from elastic.models.ties import untie_
from elastic.spaces.declared import SearchSpace
from elastic.spaces.uniform import nearest_uniform
from elastic.supernet.compact import compact
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny, wrappers
from tests.helpers.exports import small_files
from tests.helpers.families import LLAMA3, model_of
from tests.helpers.laws import close

TEXT = "Tom's 12 apples, and 345 pears; he said: \"I'll eat them all!\"  Ça va?\n\n"


def byte_level(*steps, normalizer=None) -> PreTrainedTokenizerFast:
    """Trained on a few words, so that there are merges."""
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    steps = steps or (Digits(individual_digits=True), ByteLevel(add_prefix_space=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    trainer = BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[1], unk_token=special[2],
        pad_token=special[1], chat_template="{{ messages[0].content }}",
    )  # fmt: skip


TOKENIZER = byte_level()


def net_of(family: str, heads: bool = True, **overrides) -> Supernet:
    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
             "num_key_value_heads": 4, "head_dim": 16}  # fmt: skip
    tokens = {"vocab_size": 330, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    overrides = sizes | tokens | overrides
    model = model_of(family, torch.float32, **overrides)
    declared = SearchSpace.load("llama").as_dict()
    if heads:
        declared["groups"]["heads"] = {
            "dim": "heads", "outputs": tiny.ATTENTION, "inputs": ["self_attn.o_proj"],
            "choices": [4, 3, 2],
        }  # fmt: skip
    net = Supernet(model, SearchSpace.from_dict(declared), tiny.ADAPTERS["lora"])
    return tiny.randomize_(net)


def models_of(family: str, **overrides):
    """(uniform, mixed) compact models."""
    net = net_of(family, **overrides)
    sub = net.space.random(random.Random(1))
    assert not tiny.is_uniform(net.space, sub)
    return compact(net, nearest_uniform(net.space, sub)), compact(net, sub)


def field(reader: GGUFReader, key: str):
    return reader.fields[key].contents()


# What is in the file.


@pytest.mark.parametrize("type, step", [("f32", 0), ("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 0.02)])
def test_every_tensor_is_in_the_file_once_in_its_type(tmp_path, type, step):
    _, model = models_of("llama, tied")
    reader = GGUFReader(gguf.write(model, TOKENIZER, tmp_path, type=type))
    assert field(reader, "general.architecture") == "deci"
    found = {tensor.name: tensor for tensor in reader.tensors}
    state = model.state_dict()
    assert len(found) == len(state) - 1 and "output.weight" not in found
    # Permuting rows of a head keeps the set of its values.
    for layer in range(3):
        for short, name in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj")):
            tensor = found[f"blk.{layer}.{short}.weight"]
            expected = state[f"model.layers.{layer}.{name}.weight"].numpy()
            values = dequantize(tensor.data, tensor.tensor_type)
            assert values.shape == expected.shape
            gap = np.abs(np.sort(values, 0) - np.sort(expected, 0)).max()
            assert gap <= step * np.abs(expected).max()
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds <= {type.upper(), "F32", *(["F16"] if type == "q8_0" else [])}
    size = sum(p.numel() for p in {p.data_ptr(): p for p in model.parameters()}.values())
    bytes_each = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 1.2}[type]
    assert (tmp_path / gguf.FILE).stat().st_size < bytes_each * size + 40_000


def test_a_head_that_is_the_embeddings_no_longer_is_in_the_file_too(tmp_path):
    _, model = models_of("llama, tied")
    untie_(model)
    model.lm_head.weight.data.mul_(2)
    file = gguf.write(model, TOKENIZER, tmp_path, type="f32")
    gguf.check(file, model)
    found = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(file).tensors}
    assert torch.equal(found["output.weight"], 2 * found["token_embd.weight"])


@pytest.mark.parametrize("name", ["mistral3", "qwen2-vl"])
def test_of_a_model_that_reads_images_its_language_model_is_in_the_file(name, tmp_path):
    whole = wrappers.whole(name, vocab_size=330, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    text = as_text(whole)
    file = gguf.write(text, TOKENIZER, tmp_path, type="f32")
    gguf.check(file, text)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf.FILE)
    close(tiny.logits(again.eval(), tiny.tokens()), tiny.logits(whole, tiny.tokens()), 1e-4)


def test_a_full_disk_is_named_and_nothing_is_kept(tmp_path):
    kept = tmp_path / "kept"
    with (
        pytest.raises(RunError, match=rf"^{kept}: cannot be written \(No space left"),
        new_directory(kept) as building,
        small_files(),
    ):
        gguf.write(models_of("llama")[0], TOKENIZER, building)
    assert not list(tmp_path.iterdir())


def test_sizes_of_every_layer_are_in_the_file(tmp_path):
    uniform, mixed = models_of("llama")
    reader = GGUFReader(gguf.write(mixed, TOKENIZER, tmp_path / "mixed"))
    widths = [layer.mlp.up_proj.out_features for layer in mixed.model.layers]
    heads = [layer.self_attn.q_proj.out_features // 16 for layer in mixed.model.layers]
    assert field(reader, "deci.feed_forward_length") == widths and len(set(widths)) > 1
    assert field(reader, "deci.attention.head_count") == heads and len(set(heads)) > 1
    assert field(reader, "deci.attention.head_count_kv") == [count // 2 for count in heads]
    reader = GGUFReader(gguf.write(uniform, TOKENIZER, tmp_path / "uniform", name="small"))
    assert (
        field(reader, "llama.feed_forward_length")
        == uniform.model.layers[0].mlp.up_proj.out_features
    )
    assert field(reader, "general.name") == "small"
    assert "output.weight" in {tensor.name for tensor in reader.tensors}


def test_the_tokenizer_is_in_the_file(tmp_path):
    reader = GGUFReader(gguf.write(models_of("llama")[0], TOKENIZER, tmp_path))
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == 330 and tokens[:2] == ["<|im_start|>", "<|im_end|>"]
    assert field(reader, "tokenizer.ggml.token_type")[0] == 3  # control
    assert field(reader, "tokenizer.ggml.token_type")[-1] == 5  # unused
    assert field(reader, "tokenizer.ggml.pre") == "smollm"
    assert field(reader, "tokenizer.chat_template") == TOKENIZER.chat_template
    assert field(reader, "tokenizer.ggml.add_bos_token") is False
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file=gguf.FILE)
    assert again(TEXT)["input_ids"] == TOKENIZER(TEXT)["input_ids"]


@pytest.mark.parametrize("family", ["llama", "llama, tied", "qwen2"])
def test_transformers_reads_uniform_files(family, tmp_path):
    """Not Qwen3's, of which it takes every head for one of 128 channels."""
    model, _ = models_of(family)
    gguf.write(model, TOKENIZER, tmp_path, type="f32")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=gguf.FILE, dtype=torch.float32
    ).eval()
    ids = torch.arange(3, 12)[None]
    expected = tiny.logits(model, ids)
    gap = (tiny.logits(again, ids) - expected).abs().max() / expected.abs().max()
    assert gap < 1e-5


# Gemma 3.


def pieces() -> PreTrainedTokenizerFast:
    """As SentencePiece makes Gemma's: blanks have a sign, and bytes are for what is in no piece."""
    special, bytes_ = ["<pad>", "<eos>", "<bos>", "<unk>"], [f"<0x{n:02X}>" for n in range(256)]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("a", "t"), ("\u2581", "at"), ("c", "at")]
    letters = ["\u2581", *"thecas.", *("".join(pair) for pair in merges)]
    vocab = {token: number for number, token in enumerate([*special, *bytes_, *letters])}
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>",
    )  # fmt: skip


GEMMA = {
    "vocab_size": 280, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 256, "sliding_window": 4,
    "query_pre_attn_scalar": 256, "max_position_embeddings": 128, "initializer_range": 0.2,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip


def gemma3(**overrides) -> Gemma3ForCausalLM:
    """With a layer that sees all tokens, and norms away from where they start."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(Gemma3TextConfig(**(GEMMA | overrides)))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def test_gemma_is_read_again_as_it_was(tmp_path):
    net = Supernet(gemma3(), SearchSpace.load("llama"), tiny.ADAPTERS["lora"])
    tiny.randomize_(net)
    model = compact(net, net.space.minimal())
    file = gguf.write(model, pieces(), tmp_path, type="f32")
    gguf.check(file, model)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=gguf.FILE, dtype=torch.float32
    ).eval()
    ids = torch.arange(3, 24)[None]  # past the window
    expected = tiny.logits(model, ids)
    assert (tiny.logits(again, ids) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_pieces_of_gemma_are_in_the_file(tmp_path):
    tokenizer = pieces()
    reader = GGUFReader(gguf.write(gemma3(), tokenizer, tmp_path))
    assert field(reader, "tokenizer.ggml.model") == "llama"
    types = field(reader, "tokenizer.ggml.token_type")
    assert types[:3] == [3, 3, 3] and set(types[4:260]) == {6} and types[-1] == 5  # bytes, unused
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file=gguf.FILE)
    for text in ("the cat at the", "that \u00e9 sat"):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert again(text, add_special_tokens=False)["input_ids"] == expected


@pytest.mark.parametrize("overrides, reason", [
    ({"layer_types": ["full_attention"] * 7}, "other layers than every 6th"),
    ({"final_logit_softcapping": 30.0}, "bent"),
    ({"query_pre_attn_scalar": 32}, "queries scaled"),
])  # fmt: skip
def test_what_llama_cpp_computes_otherwise_for_gemma_is_said(overrides, reason):
    assert reason in gguf.why_not(gemma3(**overrides))


# What is refused.


@pytest.mark.parametrize(
    "family, overrides, reason",
    [
        ("gpt2", {}, "GPT2LMHeadModel is not written"),
        ("mistral", {"sliding_window": 4}, "sliding window"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
        ("qwen2", {"rope_parameters": LLAMA3}, "qwen2 has no rotary"),
    ],
)
def test_what_llama_cpp_lacks_is_said(family, overrides, reason, tmp_path):
    model = model_of(family, torch.float32, **overrides)
    assert reason in gguf.why_not(model)
    with pytest.raises(ExportError, match=r"^gguf: "):
        gguf.write(model, TOKENIZER, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_qwen3_of_many_sizes_is_refused():
    uniform, mixed = models_of("qwen3")
    assert gguf.why_not(uniform, TOKENIZER) is None
    assert "--hf.uniform, or let llama.cpp" in gguf.why_not(mixed)


SPLIT = {name: Split(Regex(pattern), "isolated") for pattern, name in gguf_tokenizer.SPLITS.items()}
BYTES = ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    "tokenizer, variant",
    [
        (byte_level(ByteLevel(add_prefix_space=False)), "gpt-2"),
        (byte_level(), "smollm"),
        (byte_level(SPLIT["llama-bpe"], BYTES), "llama-bpe"),
        (byte_level(SPLIT["qwen2"], BYTES, normalizer=normalizers.NFC()), "qwen2"),
        (byte_level(ByteLevel(add_prefix_space=True)), None),
        (byte_level(ByteLevel(add_prefix_space=False), normalizer=normalizers.NFC()), None),
        (byte_level(Split(Regex(r"\d"), "isolated"), BYTES), None),
        (tiny.tokenizer(), None),
    ],
)
def test_how_a_tokenizer_splits_is_recognised(tokenizer, variant, tmp_path):
    reason = gguf_tokenizer.why_not(tokenizer)
    assert (reason is None) == (variant is not None)
    if variant is None:
        assert "splits text" in reason
    else:
        reader = GGUFReader(gguf.write(models_of("llama")[0], tokenizer, tmp_path))
        assert field(reader, "tokenizer.ggml.pre") == variant


# llama.cpp itself.


def llama_cpp_logits(file, ids: list[int]) -> np.ndarray:
    """(length, vocab)."""
    llama_cpp = pytest.importorskip("llama_cpp")
    llm = llama_cpp.Llama(
        str(file),
        n_ctx=max(64, len(ids)),
        logits_all=True,
        verbose=False,
        n_threads=1,
        type_k=0,
        type_v=0,
        flash_attn=False,  # float32: its cache is float16 otherwise
    )
    llm.eval(ids)
    return np.array(llm.scores[: len(ids)])


@pytest.mark.parametrize(
    "family, overrides",
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama, tied", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_llama_cpp_computes_the_same(family, overrides, tmp_path):
    """Of one size, and of many: the logits of every position."""
    pytest.importorskip("llama_cpp")
    for name, model in zip(("uniform", "mixed"), models_of(family, **overrides), strict=True):
        if gguf.why_not(model, TOKENIZER):
            assert (family, name) == ("qwen3", "mixed")
            continue
        file = gguf.write(model, TOKENIZER, tmp_path / name, type="f32")
        ids = list(range(3, 40))
        expected = tiny.logits(model, torch.tensor([ids]))[0].numpy()
        found = llama_cpp_logits(file, ids)
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max(), name


@pytest.mark.slow
def test_llama_cpp_goes_on_as_the_real_model_does(tmp_path):
    """SmolLM2 with other sizes in every layer: text to tokens, and greedy tokens."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from elastic.config import AdapterConfig, ModelConfig
    from elastic.models import loading as bases

    config = ModelConfig(path="smollm2", dtype="float32", device="cpu")
    tokenizer = bases.load_tokenizer(config)
    model = bases.load_model(bases.locate("smollm2"), config)
    declared = SearchSpace.load("llama").as_dict()
    # Enough is left for sentences: random cuts, without training, would leave noise.
    declared["groups"]["mlp_width"]["choices"] = [1.0, 0.96, 0.92]
    net = Supernet(model, SearchSpace.from_dict(declared), AdapterConfig(rank=32))
    sub = net.space.random(random.Random(1))
    assert not tiny.is_uniform(net.space, sub)
    small = compact(net, sub)
    # Not q8_0: with AMX, llama.cpp as of llama-cpp-python 0.3.36 ends the process on any quantised
    # model, published ones too, unless its `use_extra_bufts` is off.
    for type in ("f32", "f16"):
        file = gguf.write(small, tokenizer, tmp_path / type, type=type)
        llm = llama_cpp.Llama(str(file), n_ctx=256, verbose=False, n_threads=2)
        assert llm.tokenize(TEXT.encode(), add_bos=False) == tokenizer(TEXT)["input_ids"]
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Name the capital of France."}],
            tokenize=False,
            add_generation_prompt=True,
        )
        ids = tokenizer(chat)["input_ids"]
        assert llm.tokenize(chat.encode(), add_bos=False, special=True) == ids
        with torch.no_grad():
            expected = small.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        expected = expected[0, len(ids) :].tolist()
        found = []
        for token in llm.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0):
            found.append(token)
            if len(found) == len(expected):
                break
        assert found == expected, tokenizer.decode(found)
