"""What kind of model a configuration describes, and what that rules out; reads no weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import nn

from elastic.config import ModelConfig
from elastic.config.model import SCORE
from elastic.errors import MissingExtra, ModelError
from elastic.models.wrappers import is_in, outside, text_config, wraps

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


ENDING, POOLER = "ForSequenceClassification", "pooler"


class Kind(Enum):
    """How a model takes a text and answers."""

    DECODER = "goes on from the text, with what it has cached of it"
    RECURRENT = "goes on from the text, with a state"
    ENCODER_DECODER = "encodes the text, and decodes an answer beside it"
    CLASSIFIER = "has a head that answers with a class, or a number"


def kind_of(model: nn.Module) -> Kind:
    """Of a transformers model, which DDP or DeepSpeed may wrap."""
    model = getattr(model, "module", model)
    headed = type(model).__name__.endswith(ENDING)
    return kind_of_architecture(model.config, "classification" if headed else "language")


def kind_of_architecture(architecture: PretrainedConfig, head: str = "auto") -> Kind:
    """Of the model that a configuration becomes, with the head that `model.head` asks for."""
    if head == "auto":
        from transformers.models.auto import modeling_auto as auto

        encoders = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        encoder = architecture.model_type in encoders and not architecture.is_encoder_decoder
        head = "classification" if was_trained(architecture) or encoder else "language"
    if head != "language":
        return Kind.CLASSIFIER
    if architecture.is_encoder_decoder:
        return Kind.ENCODER_DECODER
    return Kind.RECURRENT if architecture.model_type == "rwkv" else Kind.DECODER


def is_number(classes: Sequence[str]) -> bool:
    """Whether what a head tells apart is no class, but a number."""
    return list(classes) == SCORE


def classes_of(model: PreTrainedModel) -> tuple[str, ...]:
    """What this model tells apart, in the order of its logits; empty if it answers with text."""
    if kind_of(model) is not Kind.CLASSIFIER:
        return ()
    names = model.config.id2label
    return tuple(names[number] for number in range(len(names)))


def has_types(model: PreTrainedModel) -> bool:
    """Whether it tells the first sentence of a pair from the second."""
    return getattr(model.config, "type_vocab_size", 0) > 1


def was_trained(architecture: PretrainedConfig) -> bool:
    """Whether the model was saved with a classification head."""
    return (architecture.architectures or [""])[0].endswith(ENDING)


def longest_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that it reads at most, so that a padded batch of them still has a position each."""
    longest = tokenizer.model_max_length
    if positions := getattr(text_config(model.config), "max_position_embeddings", None):
        longest = min(longest, positions)
    if first := first_position(model):
        longest = min(longest, _positions(model).num_embeddings - first)
    return longest


def first_position(model: PreTrainedModel) -> int:
    """Where the first token stands in the model's table of positions: behind the padding's, in
    RoBERTa's and its kin."""
    padding = getattr(_positions(model), "padding_idx", None)
    return 0 if padding is None else padding + 1


def _positions(model: PreTrainedModel) -> Any:
    return getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)


def learnt_positions(model: PreTrainedModel) -> int | None:
    """How many positions a table of the model has; None where they are computed for any length."""
    elsewhere = outside(model)
    tables = [
        module.num_embeddings - getattr(module, "offset", 0)  # OPT's and BART's begin behind two
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _TABLE.search(name) and not is_in(name, elsewhere)
    ]
    tables += [
        table.shape[0]
        for name, table in model.named_buffers()
        if _TABLE.search(name) and not is_in(name, elsewhere)
    ]
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min([*tables, *filter(None, [longest])]) if tables else None


_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)$")


def exact_(model: PreTrainedModel) -> PreTrainedModel:
    """Without the halving of weights and states every few blocks, which transformers does in place
    to keep float16 from overflowing and which sees no cut weights; the function is the same. It
    stays off in what is written."""
    if kind_of(model) is Kind.RECURRENT:
        model.config.rescale_every = 0
    return model


def has_states(architecture: PretrainedConfig) -> bool:
    """Whether blocks of a decoder carry a state along a sequence, such as a Mamba layer's, linear
    attention's or a short convolution's, instead of keys and values or beside them."""
    from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

    if architecture.is_encoder_decoder:
        return False
    try:
        layers = DynamicCache(config=architecture).layers
    except Exception:  # a configuration from elsewhere that says nothing of its blocks
        return False
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def no_graph(kind: Kind, architecture: PretrainedConfig) -> str | None:
    """Why a model is not written as a graph (ONNX, OpenVINO); None if it is."""
    if kind is Kind.RECURRENT:
        return "recurrent models are not written as graphs: tracing would fix the length"
    if kind is Kind.DECODER and has_states(architecture):
        return (
            "some of its blocks carry a state along the sequence, and graphs are written of keys "
            "and values alone"
        )
    if in_pieces(architecture):
        return "its code cuts the text into pieces, of which tracing would fix the number"
    return None


def in_pieces(architecture: PretrainedConfig) -> bool:
    """Whether attention is computed piece by piece of the text, as Longformer's and LED's, and
    BigBird's where it reads long texts."""
    sparse = getattr(architecture, "attention_type", None) == "block_sparse"
    return sparse or hasattr(architecture, "attention_window")


def require(config: ModelConfig, architecture: PretrainedConfig) -> None:
    """MissingExtra or ModelError when the base cannot be loaded as configured; no weights are
    read."""
    if getattr(architecture, "quantization_config", None) is not None:
        raise ModelError(
            f"model.path {config.path} has been quantised already; give the original weights, "
            "which model.quantise packs while they load"
        )
    headed = kind_of_architecture(architecture, config.head) is Kind.CLASSIFIER
    if headed and architecture.is_encoder_decoder:
        raise ModelError(
            f"model.path {config.path}: an encoder-decoder model with a classification head is not "
            "supported; choose model.head language"
        )
    if headed and wraps(architecture):
        raise ModelError(
            f"model.path {config.path} reads more than text, and a classification head is put on "
            "models of text alone; choose model.head language"
        )
    if config.quantise != "none":
        if headed:
            raise ModelError(
                f"model.quantise {config.quantise}: {config.path} gets a classification head, "
                "beside which nothing is quantised yet; choose none"
            )
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            what = f"model.quantise {config.quantise}"
            raise MissingExtra("bitsandbytes", "quantised", what) from error
