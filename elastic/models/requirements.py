"""What a command asks of a base model before weights load."""

from __future__ import annotations

from elastic.config import ModelConfig
from elastic.errors import ConfigError, ModelError
from elastic.models.kinds import Kind, has_states, no_graph, require
from elastic.models.loading import architecture_of, kind_of_base, resolve_device
from elastic.models.wrappers import no_text_class


def require_graph(config: ModelConfig, what: str) -> None:
    """ModelError for a model of which no graph can be written."""
    architecture = architecture_of(config)
    if reason := no_graph(kind_of_base(config), architecture) or no_text_class(architecture):
        raise ModelError(f"{what}: {config.path}: {reason}; choose torch")


def require_training(config: ModelConfig) -> None:
    """What `require` raises, or ConfigError when the type cannot be trained on this device."""
    architecture = architecture_of(config)
    require(config, architecture)
    device = resolve_device(config.device)
    if config.dtype == "float16" and device.type == "cpu":
        raise ConfigError(
            "model.dtype float16 on cpu: small gradients vanish without a loss scaler, which only "
            "accelerators have; choose bfloat16 or float32, or model.device cuda"
        )


def require_packing(config: ModelConfig) -> None:
    """ConfigError for a model whose sequences cannot share a row; no weights are read."""
    reasons = {
        Kind.CLASSIFIER: "a classification head, which answers once for every row",
        Kind.ENCODER_DECODER: "an encoder, whose rows answer in the decoder's",
        Kind.RECURRENT: "a state, which one sequence would hand to the next",
    }
    kind = kind_of_base(config)
    if kind is Kind.DECODER and has_states(architecture_of(config)):
        kind = Kind.RECURRENT
    if reason := reasons.get(kind):
        raise ConfigError(f"packing: {config.path} has {reason}; leave packing out")
