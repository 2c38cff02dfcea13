"""An ONNX graph in ONNX Runtime: a session, its cache, and what it is fed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from elastic.errors import MissingExtra

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch import Tensor
    from transformers.cache_utils import Cache


def cache_names(side: str, layers: int) -> list[str]:
    """`side.0.key, side.0.value, side.1.key, ...`, as onnxruntime-genai and openvino expect."""
    return [f"{side}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def filled(tensors: Sequence[Tensor]) -> Cache:
    """A cache that holds these keys and values, `key, value` for every layer."""
    from transformers.cache_utils import Cache, DynamicLayer

    layers = []
    for keys, values in zip(tensors[0::2], tensors[1::2], strict=True):
        # Not `update`: it would concatenate to an untyped empty tensor, which OpenVINO refuses.
        layer = DynamicLayer()
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        layer.dtype, layer.device = keys.dtype, keys.device
        layers.append(layer)
    return Cache(layers=layers)


def flattened(cache: Cache) -> list[Tensor]:
    """`key, value` of every layer."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def session_of(path: Path, threads: int | None = None) -> InferenceSession:
    """The graph, ready to run on the CPU."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime", "onnx", "running ONNX models") from error

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0: one per physical core
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def step_inputs(
    input_ids: np.ndarray, past: int, names: set[str], types: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """What the graph with these inputs reads beside its cache, for tokens (batch, sequence) after
    `past` others. A model without positions (ALiBi) has no input for them."""
    batch, sequence = input_ids.shape
    positions = np.arange(past, past + sequence, dtype=np.int64)
    found = {
        "input_ids": np.ascontiguousarray(input_ids, dtype=np.int64),
        "attention_mask": np.ones((batch, past + sequence), np.int64),
        "position_ids": np.tile(positions, (batch, 1)),
        "token_type_ids": np.zeros((batch, sequence), np.int64) if types is None else types,
    }
    return {name: array for name, array in found.items() if name in names}


def at_the_end(logits: np.ndarray) -> np.ndarray:
    """(batch, vocab) of the last position, or (batch, classes) as it is."""
    return logits[:, -1] if logits.ndim == 3 else logits
