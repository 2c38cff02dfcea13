"""What stands beside a graph, so that the runtimes' own pipelines read its folder.

A folder is all that each of them is given: transformers' config, the tokenizer and its chat
template; for onnxruntime-genai its own `genai_config.json`; for openvino-genai the tokenizer as two
OpenVINO models.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.files import write_json
from elastic.formats import hf
from elastic.formats.config_sizes import query_groups
from elastic.formats.onnx import FILE
from elastic.formats.onnx_session import cache_names, flattened
from elastic.formats.text_only import as_text
from elastic.formats.tracing import ones, traceable
from elastic.models import compat
from elastic.models.kinds import Kind, kind_of
from elastic.models.vocabulary import tokens_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


CONFIG = "genai_config.json"
TOKENIZER, DETOKENIZER = "openvino_tokenizer.xml", "openvino_detokenizer.xml"
TYPE = "decoder"
"""What onnxruntime-genai calls any decoder that follows its names. It knows some families by their
own names, too, and computes the same for them."""
EQUAL_LENGTHS = (
    "prompts of one batch must be of one length, for it pads on the right and the graph has logits "
    "of the last position alone; write it with logits all, or generate one by one"
)
UNPAGED = "open it with LLMPipeline(folder, 'CPU', ATTENTION_BACKEND='SDPA')"
"""The way around what paged attention, openvino-genai's own choice, does not do (2026.4)."""


def companions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    runtime: str,
    *,
    logits: str = "last",
) -> dict[str, str]:
    """Write all of them beside a graph for `runtime` ("onnx", "openvino") whose head was computed
    as `logits` says.

    Returns, by package, what its pipeline cannot do with this folder; nothing where there is
    nothing to say.
    """
    directory, answers = Path(directory), kind_of(model) is not Kind.CLASSIFIER
    model = as_text(model)  # as in the graph
    hf.write_config(hf.described_config(model, code=False), directory)
    if (generation := getattr(model, "generation_config", None)) is not None:
        hf.write_generation(generation, directory)
    hf.write_tokenizer(tokenizer, directory)
    if runtime == "openvino":
        reason = write_tokenizer(tokenizer, directory, answers=answers) or unpaged(model)
        return {"openvino-genai": reason} if reason else {}
    if not answers:
        return {}
    if reason := why_not(model):
        return {"onnxruntime-genai": reason}
    write_json(directory / CONFIG, described(model, tokenizer))
    return {"onnxruntime-genai": EQUAL_LENGTHS} if logits == "last" else {}


def why_not(model: PreTrainedModel) -> str | None:
    """Why onnxruntime-genai does not run this model's graph; None if it does."""
    reasons = {
        Kind.CLASSIFIER: "it generates text, and a classifier answers with a class",
        Kind.ENCODER_DECODER: "it runs decoders, not encoder-decoder models",
        Kind.RECURRENT: "it has no place for the state of this model",
    }
    if reason := reasons.get(kind_of(model)):
        return reason
    shapes = [tuple(tensor.shape[1::2]) for tensor in _cache(model)]
    if len(set(shapes)) > 1:
        found = ", ".join(f"{heads} of {size}" for heads, size in shapes[0::2])
        return (
            f"it wants the same key-value heads in all layers, and these have {found}; "
            "choose a sub-adapter without attention heads that differ"
        )
    return None


def described(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The contents of `genai_config.json`."""
    config, generation = model.config, getattr(model, "generation_config", None)
    cache = _cache(model)
    _, heads, _, head_size = cache[0].shape
    length = longest(model)
    ends = [
        *_numbers(getattr(generation, "eos_token_id", None)),
        *_numbers(config.eos_token_id),
        *_numbers(tokenizer.eos_token_id),
    ]
    pad = tokenizer.pad_token_id
    key, value = cache_names("past_key_values", 1)
    present_key, present_value = cache_names("present", 1)
    described = {
        "type": TYPE,
        "context_length": length,
        "vocab_size": tokens_of(model),
        "eos_token_id": list(dict.fromkeys(ends)),
        "pad_token_id": ends[0] if pad is None else pad,
        "decoder": {
            "filename": FILE,
            "hidden_size": config.hidden_size,
            "head_size": head_size,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": heads,
            "num_hidden_layers": len(cache) // 2,
            "session_options": {"provider_options": []},
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "position_ids": "position_ids",
                "past_key_names": key.replace("0", "%d"),
                "past_value_names": value.replace("0", "%d"),
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": present_key.replace("0", "%d"),
                "present_value_names": present_value.replace("0", "%d"),
            },
        },
    }
    if tokenizer.bos_token_id is not None:
        described["bos_token_id"] = tokenizer.bos_token_id
    # The graph returns a longer cache each time; it does not write into the one it was given.
    search = {"max_length": length, "do_sample": False, "past_present_share_buffer": False}
    return {"model": described, "search": search}


def longest(model: PreTrainedModel) -> int:
    """Tokens of a text at most; 2048 where the model names no limit (ALiBi)."""
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        if value := getattr(model.config, name, None):
            return value
    return 2048


def unpaged(model: PreTrainedModel) -> str | None:
    """Why openvino-genai must not run this model with its paged attention; None if it may."""
    if kind_of(model) is not Kind.DECODER:
        return None
    layers = getattr(model.config, "layer_types", None)
    window = getattr(model.config, "sliding_window", None) is not None
    if "sliding_attention" in layers if layers else window:
        return f"its paged attention reads past this model's sliding window; {UNPAGED}"
    shared = set(query_groups(model).values())
    if len(shared) > 1:
        found = ", ".join(map(str, sorted(shared)))
        return (
            "its paged attention can end the process where the layers have unlike numbers of query "
            f"heads for each key-value head ({found}); {UNPAGED}"
        )
    return None


def _cache(model: PreTrainedModel) -> Sequence[Tensor]:
    """Keys and values (1, kv_heads, 1, head_size) of every layer, after one token."""
    with traceable(model):
        return flattened(compat.cache_of(model(input_ids=ones(model, 1, 1), use_cache=True)))


def _numbers(value: int | Sequence[int] | None) -> Sequence[int]:
    return () if value is None else (value,) if isinstance(value, int) else value


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase, directory: Path, *, answers: bool = True
) -> str | None:
    """Write the tokenizer and, for what `answers` with text, the way back as OpenVINO models;
    returns why that was not possible.

    The chat template is inside the first of them.
    """
    try:
        from openvino_tokenizers import convert_tokenizer
    except ImportError:
        return (
            "the tokenizer was not converted, which needs openvino-tokenizers; "
            "pip install 'elastic-adapters[genai]'"
        )
    import openvino

    # A stateful decoder continues behind the last position, which must not be padding.
    padded = copy.deepcopy(tokenizer)
    padded.padding_side = "left" if answers else tokenizer.padding_side
    try:
        found = convert_tokenizer(padded, with_detokenizer=answers)
    except Exception as error:  # it raises many kinds, and any of them leaves the graph as it is
        reason = (str(error).splitlines() or [""])[0]
        return f"the tokenizer cannot be converted: {type(error).__name__}: {reason}"
    models = found if answers else (found,)
    for part, name in zip(models, (TOKENIZER, DETOKENIZER), strict=False):
        openvino.save_model(part, directory / name, compress_to_fp16=False)
    return None
