"""A compact Llama in the layout of NVIDIA's Puzzle models, whose blocks have sizes of their own.

vLLM, SGLang, TensorRT-LLM and mlx-lm have classes of their own for it (`DeciLMForCausalLM`, of type
`nemotron-nas`), so that layers of different sizes run there without code of ours. It says less than
a compact model may need:

- `ffn_mult` of a block makes the width of its MLP, a multiple of 256;
- every block has the same query heads, as many as fill the hidden size, and its `n_heads_in_group`
  says how many of them share a key-value head.

What lies between is filled up with zeros, which change nothing. Blocks that are left out are not
written: the layout could call them `no_op`, and the model is the same without.

The rules stand in vLLM's vllm/model_executor/models/nemotron_nas.py, in SGLang's
sglang/srt/models/nemotron_nas.py, in TensorRT-LLM's _torch/models/modeling_nemotron_nas.py and in
mlx-lm's mlx_lm/models/nemotron-nas.py. The first three read blocks as objects, of a class that the
folder brings with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from elastic.errors import ExportError
from elastic.files import read_json, write_text
from elastic.formats import hf, llama_like, shards
from elastic.formats.llama_like import head_size_of, sizes_of
from elastic.formats.padding import spread
from elastic.models import compat

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
ARCHITECTURE, TYPE = "DeciLMForCausalLM", "nemotron-nas"
MULTIPLE = 256
"""What divides the widths of MLPs."""
CODE = "configuration_decilm.py"
_CLASS = '''"""The sizes of a model, block by block; written by elastic-adapters.

Servers have the model's class, and read `block_configs` as objects.
"""

from transformers import LlamaConfig


class Sizes(dict):
    """What has its keys as attributes, too."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [
            Sizes({part: Sizes(sizes) for part, sizes in block.items()})
            for block in block_configs or []
        ]
'''


@dataclass(frozen=True)
class Block:
    """Sizes of one block, as they are written."""

    group: int
    """Query heads that share a key-value head."""
    width: int
    """Channels of the MLP."""


@dataclass(frozen=True)
class Padding:
    """What zeros fill up, in all blocks together."""

    mlp_channels: int
    query_heads: int
    key_value_heads: int
    params: int


def why_not(model: PreTrainedModel) -> str | None:
    """Why this compact model does not fit the layout; None if it does."""
    name = type(model).__name__
    if name not in FAMILIES:
        return f"{name} is no model of Llama's layers; of {', '.join(FAMILIES)} it is written"
    if reason := llama_like.why_not(model):
        return reason
    hidden, size, sizes = model.config.hidden_size, head_size_of(model), sizes_of(model)
    most = max(sizes.heads)
    if hidden % size or hidden // size < most:
        return (
            f"heads of the layout are together as wide as the hidden states, {hidden} channels, "
            f"and {most} heads of {size} are not, however many are filled up with zeros"
        )
    for number, (heads, keys) in enumerate(zip(sizes.heads, sizes.key_heads, strict=True)):
        if not _groups(heads, keys, hidden // size):
            return (
                f"block {number} has {keys} key-value heads and {heads} query heads, which no "
                f"grouping of {hidden // size} query heads holds"
            )
    return None


def cannot(model: PreTrainedModel) -> dict[str, str]:
    """By program, why it does not run what is written of this model."""
    found = {}
    if len({block.group for block in _blocks(model)}) > 1:
        found["SGLang"] = "it wants as many key-value heads in every block"
    if _has_bias(model, "mlp"):
        found["SGLang"] = "its class has no biases in the MLP, and leaves them out"
    if _has_bias(model, "mlp") or _has_bias(model, "self_attn"):
        found["TensorRT-LLM"] = "its class has no biases"
    return found


def padding(model: PreTrainedModel) -> Padding:
    """What is written of this model beside itself."""
    blocks, own = _blocks(model), sizes_of(model)
    heads = model.config.hidden_size // head_size_of(model)
    written = sum(tensor.numel() for tensor in _skeleton(_config(model), blocks).parameters())
    return Padding(
        mlp_channels=sum(block.width for block in blocks) - sum(own.widths),
        query_heads=heads * len(blocks) - sum(own.heads),
        key_value_heads=sum(heads // block.group for block in blocks) - sum(own.key_heads),
        params=written - sum(tensor.numel() for tensor in model.parameters()),
    )


@torch.no_grad()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = hf.SHARD,
) -> Path:
    """Write weights (safetensors, in `dtype` if given), config with its class, and tokenizer.

    ExportError if the layout does not hold this model, which is left as it is.
    """
    if reason := why_not(model):
        raise ExportError(f"nemotron_nas: {reason}")
    dtype = dtype or model.dtype
    config, blocks = _config(model), _blocks(model)
    directory.mkdir(parents=True, exist_ok=True)
    shards.write(
        _skeleton(config, blocks), dict(_tensors(model)), directory,
        dtype=dtype, original=False, max_shard_size=max_shard_size,
    )  # fmt: skip
    write_text(directory / CODE, _CLASS)
    words = {
        "architectures": [ARCHITECTURE],
        "model_type": TYPE,
        "auto_map": {"AutoConfig": f"{Path(CODE).stem}.DeciLMConfig"},
        "block_configs": [_words(block, config.hidden_size) for block in blocks],
        "dtype": str(dtype).removeprefix("torch."),
    }
    hf.write_config(config, directory, **compat.rotary_words(config), **words)
    if model.can_generate():
        hf.write_generation(model.generation_config, directory)
    if tokenizer is not None:
        hf.write_tokenizer(tokenizer, directory)
    return directory


def load(directory: Path) -> LlamaForCausalLM:
    """The folder again, of transformers' Llama, block by block in the sizes that its config says;
    ExportError for tensors of other names or sizes."""
    from transformers import LlamaConfig

    words = read_json(directory / "config.json")
    blocks = [_block_of(each, words["hidden_size"]) for each in words["block_configs"]]
    config = LlamaConfig.from_dict(words | {"model_type": "llama"})
    model = _skeleton(config, blocks)
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ExportError(f"nemotron_nas: {directory}: {error}") from error
    return model.requires_grad_(False).eval()


@torch.no_grad()
def check(directory: Path, model: PreTrainedModel) -> None:
    """ExportError unless the folder, read again, has every tensor to the bit and computes what the
    model does in the type that was written."""
    found = load(directory)
    stored, state = found.dtype, found.state_dict()
    for name, made in _tensors(model):
        if not torch.equal(state[name], made().to("cpu", stored)):
            raise ExportError(f"nemotron_nas: {name} is not what was written after reading again")
    if model.dtype != stored:
        model = copy.deepcopy(model)
        for parameter in model.parameters():  # the frequencies of rotary embeddings are not written
            parameter.copy_(parameter.to(stored))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, 16), generator=generator).to(model.device)
    found = found.to(model.device, model.dtype)
    expected, logits = (each(input_ids=ids, use_cache=False).logits for each in (model, found))
    gap, largest = float((logits - expected).abs().max()), float(expected.abs().max())
    if not gap <= 1e-4 * largest:  # sums over more terms, in another order
        raise ExportError(
            f"nemotron_nas: what was written computes logits that differ by {gap:.3g}, of "
            f"{largest:.3g} at most"
        )


def _has_bias(model: PreTrainedModel, part: str) -> bool:
    """Whether linear layers of this part of the blocks have biases."""
    layers = (layer for block in model.model.layers for layer in getattr(block, part).children())
    return any(getattr(layer, "bias", None) is not None for layer in layers)


def _groups(own: int, keys: int, heads: int) -> list[int]:
    """Of so many query heads, those for one key-value head that leave a place for each of `own`."""
    found = range(own // keys, heads + 1)
    return [each for each in found if heads % each == 0 and heads // each >= keys]


def _blocks(model: PreTrainedModel) -> list[Block]:
    """With the fewest key-value heads and the narrowest MLPs that hold the model's."""
    sizes, heads = sizes_of(model), model.config.hidden_size // head_size_of(model)
    return [
        Block(max(_groups(own, keys, heads)), -(-width // MULTIPLE) * MULTIPLE)
        for own, keys, width in zip(sizes.heads, sizes.key_heads, sizes.widths, strict=True)
    ]


def _words(block: Block, hidden: int) -> dict[str, Any]:
    """As config.json says a block; mlx-lm knows no other words."""
    usual = {"no_op": False, "replace_with_linear": False}
    words = {
        "attention": {**usual, "n_heads_in_group": block.group},
        "ffn": {**usual, "ffn_mult": round(1.5 * block.width / hidden, 6)},
    }
    assert _block_of(words, hidden) == block
    return words


def _block_of(words: Mapping[str, Any], hidden: int) -> Block:
    """As the classes understand these words."""
    width = int(2 * words["ffn"]["ffn_mult"] * hidden / 3)
    return Block(words["attention"]["n_heads_in_group"], -(-width // MULTIPLE) * MULTIPLE)


def _config(model: PreTrainedModel) -> LlamaConfig:
    """What a Llama of this model's largest block would have."""
    from transformers import LlamaConfig

    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "hidden_act", "max_position_embeddings",
        "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "initializer_range",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    words = {name: copy.deepcopy(getattr(model.config, name)) for name in same}
    blocks, size = _blocks(model), head_size_of(model)
    heads = words["hidden_size"] // size
    return LlamaConfig(
        **words,
        head_dim=size,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // block.group for block in blocks),
        intermediate_size=max(block.width for block in blocks),
        attention_bias=_has_bias(model, "self_attn"),
        mlp_bias=_has_bias(model, "mlp"),
    )


def _skeleton(config: LlamaConfig, blocks: Sequence[Block]) -> LlamaForCausalLM:
    """A Llama of these blocks, without memory."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    with torch.device("meta"):
        model = LlamaForCausalLM(copy.deepcopy(config))
        for number, block in enumerate(blocks):
            own = copy.deepcopy(model.config)
            own.num_key_value_heads = own.num_attention_heads // block.group
            own.intermediate_size = block.width
            model.model.layers[number] = LlamaDecoderLayer(own, number)
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
    return model


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name in the layout, and what makes the tensor: the model's, with zeros between."""
    spreads = list(_spreads(model))
    longer = {name for name, *_ in spreads}
    for name, make in shards.tensors_of(model).items():
        if name.rpartition(".")[0] not in longer:
            yield name, make
    biased = {part: _has_bias(model, part) for part in ("self_attn", "mlp")}
    for name, axis, places, full in spreads:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        yield f"{name}.weight", partial(spread, layer.weight.detach(), axis, places, full)
        if biased[name.split(".")[-2]]:
            bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
            longer_bias = partial(spread, bias.detach(), 0, places, full)
            yield f"{name}.bias", longer_bias if axis == 0 else bias.detach


def _spreads(model: PreTrainedModel) -> Iterator[tuple[str, int, Tensor, int]]:
    """Linear layer, the axis that is written longer, where its channels go, and how long it is."""
    sizes, size, hidden = sizes_of(model), head_size_of(model), model.config.hidden_size
    for number, block in enumerate(_blocks(model)):
        heads, keys = torch.arange(sizes.heads[number]), sizes.key_heads[number]
        own = len(heads) // keys
        # Those of a key-value head are the first of its group.
        starts = (heads // own * block.group + heads % own) * size
        queries = (starts[:, None] + torch.arange(size)).flatten()
        channels, name = torch.arange(sizes.widths[number]), f"model.layers.{number}"
        yield f"{name}.self_attn.q_proj", 0, queries, hidden
        yield f"{name}.self_attn.o_proj", 1, queries, hidden
        for layer in ("k_proj", "v_proj"):
            yield f"{name}.self_attn.{layer}", 0, torch.arange(keys * size), hidden // block.group
        for layer in ("gate_proj", "up_proj"):
            yield f"{name}.mlp.{layer}", 0, channels, block.width
        yield f"{name}.mlp.down_proj", 1, channels, block.width
