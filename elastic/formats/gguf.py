"""A compact model as one GGUF file, which llama.cpp and what is built on it run.

Layers of one size are written as the family's own architecture. Where sizes differ from layer to
layer, the loader of `llama` refuses: it creates every layer with the sizes of the first. That of
`deci` (Llama-Nemotron, whose blocks were searched too) asks for head counts and the width of the
MLP layer by layer and computes what Llama does, so those files say `deci`.

Keys are of the GGUF specification; what the loaders read is in llama.cpp's src/models/llama.cpp,
deci.cpp, qwen2.cpp, qwen3.cpp and gemma3.cpp, and llama-model.cpp for what all share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from elastic.errors import ExportError, MissingExtra
from elastic.formats import gemma_like, gguf_tokenizer, llama_like

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE = "model.gguf"
Type = Literal["f32", "f16", "bf16", "q8_0"]
FILE_TYPES: dict[Type, str] = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"
}  # fmt: skip
"""What a file says of most of its tensors."""


@dataclass(frozen=True)
class Family:
    """How llama.cpp knows a family of models."""

    uniform: str
    """llama.cpp's name of the architecture, one size for all layers."""
    mixed: str | None
    """The one whose loader reads a size per layer and which computes the same; None: there is
    none."""
    interleaved: bool
    """Whether `uniform` rotates neighbouring channels of a head, as `deci` does, instead of its
    halves, as transformers does: rows of queries and keys then go in another order."""


FAMILIES = {
    "LlamaForCausalLM": Family("llama", "deci", True),
    "MistralForCausalLM": Family("llama", "deci", True),
    "Qwen2ForCausalLM": Family("qwen2", "deci", False),
    "Qwen3ForCausalLM": Family("qwen3", None, False),
    "Gemma3ForCausalLM": Family("gemma3", None, False),
}


def require() -> None:
    """MissingExtra unless GGUF can be written here; asked before anything slow."""
    if find_spec("gguf") is None:
        raise MissingExtra("gguf", "gguf", "writing GGUF")


def why_not(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> str | None:
    """What llama.cpp lacks for this compact model or tokenizer; None if it has all."""
    name = type(model).__name__
    family = FAMILIES.get(name)
    if family is None:
        return f"{name} is not written as GGUF; of {', '.join(FAMILIES)} it is"
    like = gemma_like if gemma_like.is_one(model) else llama_like
    if reason := like.why_not(model):
        return reason
    mixed = not llama_like.sizes_of(model).uniform
    if mixed and family.mixed is None:
        return (
            f"no architecture of llama.cpp computes {name} with sizes of its own in every layer "
            f"({family.uniform} has one for all); choose --hf.uniform, or let llama.cpp's own "
            "converter read a folder that --hf.padded wrote"
        )
    kind = gemma_like.positions(model.config)["rope_type"]
    if kind == "llama3" and _architecture(model)[0] not in ("llama", "deci"):
        return f"{_architecture(model)[0]} has no rotary embeddings of type 'llama3'"
    return None if tokenizer is None else gguf_tokenizer.why_not(tokenizer)


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    type: Type = "f16",
    name: str | None = None,
) -> Path:
    """Write DIRECTORY/model.gguf and return its path.

    Matrices are in `type`; norms and biases float32, which llama.cpp demands. q8_0 keeps blocks of
    32 columns, so matrices of other widths stay f16. A tied head is not written a second time.
    ExportError if llama.cpp could not run it.
    """
    require()
    from gguf import GGUFWriter

    if reason := why_not(model, tokenizer):
        raise ExportError(f"gguf: {reason}")
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / FILE
    writer = GGUFWriter(file, _architecture(model)[0])
    _settings(writer, model, type, name)
    gguf_tokenizer.write(writer, tokenizer, model.config.vocab_size)
    for tensor_name, tensor in _tensors(model):
        values, kind = _stored(tensor, type)
        writer.add_tensor_info(tensor_name, values.shape, values.dtype, values.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in _tensors(model):  # one by one, so that a large model is not held twice
        writer.write_tensor_data(_stored(tensor, type)[0])
    writer.close()
    return file


def check(file: Path, model: PreTrainedModel) -> None:
    """ExportError unless the file, read again, holds every tensor of the model to the bit."""
    from gguf import GGUFReader, LlamaFileType

    reader = GGUFReader(file)
    kinds = {int(getattr(LlamaFileType, name)): kind for kind, name in FILE_TYPES.items()}
    type = kinds[int(reader.fields["general.file_type"].contents())]
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in _tensors(model):
        values, _ = _stored(tensor, type)
        if name not in found or found[name].data.tobytes() != values.tobytes():
            raise ExportError(f"gguf: {name} is not what was written after reading {file} again")


def _architecture(model: PreTrainedModel) -> tuple[str, bool]:
    """Its name, and whether it rotates neighbouring channels."""
    family = FAMILIES[type(model).__name__]
    if llama_like.sizes_of(model).uniform:
        return family.uniform, family.interleaved
    assert family.mixed is not None  # says `why_not`
    return family.mixed, True


def _settings(writer: GGUFWriter, model: PreTrainedModel, type: Type, name: str | None) -> None:
    from gguf import LlamaFileType, RopeScalingType

    config, sizes, head_size = (
        model.config,
        llama_like.sizes_of(model),
        llama_like.head_size_of(model),
    )

    def one_or_all(values: Sequence[int]) -> int | list[int]:
        return values[0] if sizes.uniform else list(values)

    if name is not None:
        writer.add_name(name)
    writer.add_file_type(getattr(LlamaFileType, FILE_TYPES[type]))
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(model.model.layers))
    writer.add_feed_forward_length(one_or_all(sizes.widths))
    writer.add_head_count(one_or_all(sizes.heads))
    writer.add_head_count_kv(one_or_all(sizes.key_heads))
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_size)
    rope = gemma_like.positions(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if gemma_like.is_one(model):
        writer.add_sliding_window(config.sliding_window)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Name in GGUF and tensor, (rows, columns) or (channels,)."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture, interleaved = _architecture(model)
    number = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    names = get_tensor_name_map(number, len(model.model.layers))
    sizes, seen = llama_like.sizes_of(model), set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:  # a tied head
            continue
        seen.add(tensor.data_ptr())
        short = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if short is None:
            raise ExportError(f"gguf: {architecture} of llama.cpp has no place for {name}")
        parts = name.split(".")
        if interleaved and parts[-2] in ("q_proj", "k_proj"):
            heads = sizes.heads if parts[-2] == "q_proj" else sizes.key_heads
            tensor = _neighbours(tensor, heads[int(parts[2])])
        if gemma_like.is_one(model) and tensor.dim() == 1:  # norms, which it writes less 1
            tensor = tensor.float() + 1
        yield short, tensor
    if model.config.rope_parameters.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _frequency_factors(model)


def _neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Rows of every head in another order: transformers rotates channel i with i + half, these
    architectures 2 i with 2 i + 1."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _frequency_factors(model: PreTrainedModel) -> Tensor:
    """What llama.cpp divides the plain frequencies by: (head_size / 2,)."""
    size, base = llama_like.head_size_of(model), model.config.rope_parameters["rope_theta"]
    plain = base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return plain / model.model.rotary_emb.inv_freq.double().cpu()


def _stored(tensor: Tensor, type: Type) -> tuple[np.ndarray, GGMLQuantizationType]:
    """Values as they lie in the file, and GGML's number of their type."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[type.upper()]
    if tensor.dim() == 1:
        kind = GGMLQuantizationType.F32
    elif type == "q8_0" and tensor.shape[1] % 32:
        kind = GGMLQuantizationType.F16
    return quants.quantize(tensor.detach().float().cpu().contiguous().numpy(), kind), kind
