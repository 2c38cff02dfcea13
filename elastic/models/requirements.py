"""What a command asks of a base model before weights load."""

from __future__ import annotations

from elastic.config import ModelConfig
from elastic.errors import ConfigError, ModelError
from elastic.models.kinds import is_classifier, is_recurrent, no_graph, require
from elastic.models.loading import architecture_of, resolve_device


def require_graph(config: ModelConfig, what: str) -> None:
    """ModelError for a model of which no graph can be written."""
    if reason := no_graph(architecture_of(config)):
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
    architecture, kind = architecture_of(config), None
    if is_classifier(architecture, config.head):
        kind = "a classification head, which answers once for every row"
    elif architecture.is_encoder_decoder:
        kind = "an encoder, whose rows answer in the decoder's"
    elif is_recurrent(architecture):
        kind = "a state, which one sequence would hand to the next"
    if kind:
        raise ConfigError(f"packing: {config.path} has {kind}; leave packing out")
