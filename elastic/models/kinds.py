"""What kind of model a configuration describes, and what that rules out; reads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from elastic.config import ModelConfig
from elastic.config.model import SCORE
from elastic.errors import MissingExtra, ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


ENDING, POOLER = "ForSequenceClassification", "pooler"


def is_classifier(architecture: PretrainedConfig, head: str = "auto") -> bool:
    """Whether a model of this configuration gets a classification head."""
    if head != "auto":
        return head in ("classification", "regression")
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as encoders

    encoder = architecture.model_type in encoders and not architecture.is_encoder_decoder
    return was_trained(architecture) or encoder


def is_regressor(architecture: PretrainedConfig, head: str = "auto") -> bool:
    """Whether that head answers with a number."""
    saved = was_trained(architecture) and len(architecture.id2label) == 1
    return head == "regression" or (head == "auto" and saved)


def is_number(classes: Sequence[str]) -> bool:
    """Whether what a head tells apart is no class, but a number."""
    return list(classes) == SCORE


def classes_of(model: PreTrainedModel) -> tuple[str, ...]:
    """What this model tells apart, in the order of its logits; empty if it answers with text."""
    if not type(model).__name__.endswith(ENDING):
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
    if positions := getattr(model.config, "max_position_embeddings", None):
        longest = min(longest, positions)
    table: Any = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if getattr(table, "padding_idx", None) is not None:  # RoBERTa's begin behind the padding's
        longest = min(longest, table.num_embeddings - table.padding_idx - 1)
    return longest


TYPES = ("rwkv",)


def is_recurrent(config: PretrainedConfig) -> bool:
    return config.model_type in TYPES


def exact_(model: PreTrainedModel) -> PreTrainedModel:
    """Without the halving of weights and states every few blocks, which transformers does in place
    to keep float16 from overflowing and which sees no cut weights; the function is the same. It
    stays off in what is written."""
    if is_recurrent(model.config):
        model.config.rescale_every = 0
    return model


def decoded_together(config: PretrainedConfig, batch: int) -> int:
    """How many sequences at most, of so many: transformers mixes the states of a batch that it
    decodes."""
    return 1 if is_recurrent(config) else batch


def no_graph(architecture: PretrainedConfig) -> str | None:
    """Why a model is not written as a graph (ONNX, OpenVINO); None if it is."""
    if is_recurrent(architecture):
        return "recurrent models are not written as graphs: tracing would fix the length"
    return None


def require(config: ModelConfig, architecture: PretrainedConfig) -> None:
    """MissingExtra or ModelError when the base cannot be loaded as configured; no weights are
    read."""
    if getattr(architecture, "quantization_config", None) is not None:
        raise ModelError(
            f"model.path {config.path} has been quantised already; give the original weights, "
            "which model.quantise packs while they load"
        )
    if architecture.is_encoder_decoder and is_classifier(architecture, config.head):
        raise ModelError(
            f"model.path {config.path}: an encoder-decoder model with a classification head is not "
            "supported; choose model.head language"
        )
    if config.quantise != "none":
        if is_classifier(architecture, config.head):
            raise ModelError(
                f"model.quantise {config.quantise}: {config.path} gets a classification head, "
                "beside which nothing is quantised yet; choose none"
            )
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            what = f"model.quantise {config.quantise}"
            raise MissingExtra("bitsandbytes", "quantised", what) from error
