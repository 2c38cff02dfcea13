"""An ONNX graph in ONNX Runtime: a session, its cache, and what it is fed."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elastic.errors import ExportError, MissingExtra

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue
    from torch import Tensor
    from transformers.cache_utils import Cache


PAST, PRESENT = "past_key_values.", "present."
BRANCH = "use_cache_branch"


def cache_names(side: str, layers: int, part: str = "") -> list[str]:
    """`side.0.key, side.0.value, side.1.key, ...`, as onnxruntime-genai and openvino expect. Where
    a layer has two parts, as optimum calls them: .decoder (self-attention) and .encoder
    (cross-attention), `side.0.part.key, ...`."""
    return [f"{side}.{layer}{part}.{kind}" for layer in range(layers) for kind in ("key", "value")]


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
    return [tensor for layer in layers_of(cache) for tensor in (layer.keys, layer.values)]


def layers_of(cache: Cache) -> list[Any]:
    """Of self-attention, where there is room for an encoder's keys and values beside them."""
    return getattr(cache, "self_attention_cache", cache).layers


def session_of(path: Path, threads: int | None = None) -> InferenceSession:
    """The graph, ready to run on the CPU; MissingExtra without onnxruntime, ExportError where it
    cannot run."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime", "onnx", "running ONNX models") from error

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0: one per physical core
    providers = ["CPUExecutionProvider"]
    with _runs():
        return onnxruntime.InferenceSession(str(path), options, providers=providers)


@contextmanager
def _runs() -> Iterator[None]:
    """ExportError for whatever onnxruntime raises of a graph; its errors have no class of their
    own."""
    try:
        yield
    except Exception as error:
        raise ExportError(f"onnx: the graph does not run: {str(error).splitlines()[0]}") from error


def step_inputs(
    input_ids: np.ndarray, past: int, names: Container[str], types: np.ndarray | None = None
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
        "beam_idx": np.arange(batch, dtype=np.int32),
        BRANCH: np.array([past > 0]),
    }
    return {name: array for name, array in found.items() if name in names}


def empty_past(shapes: Mapping[str, Sequence], batch: int) -> dict[str, np.ndarray]:
    """What a graph reads as its cache before the first token. `shapes` are those of its inputs; of
    past_key_values.N.* (batch, kv_heads, past, head_dim) the known axes 1 and 3 are read."""
    return {
        name: np.zeros((batch, shape[1], 0, shape[3]), np.float32)
        for name, shape in shapes.items()
        if name.startswith(PAST)
    }


def at_the_end(logits: np.ndarray) -> np.ndarray:
    """(batch, vocab) of the last position, or (batch, classes) as it is."""
    return logits[:, -1] if logits.ndim == 3 else logits


class CachingRunner:
    """Prefill and decode of a runtime that keeps the cache between calls."""

    own_threads = True

    _length = 0
    """Tokens in the cache."""

    def prefill(self, input_ids: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
        """Logits (batch, vocab) after the prompts (batch, prompt); forgets what came before."""
        self._forget(len(input_ids))
        self._length = 0
        return self._step(input_ids, types)

    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        """Logits (batch, vocab) after one more token each, (batch, 1)."""
        return self._step(input_ids)

    def _forget(self, batch: int) -> None:
        """Empty the cache, for so many sequences."""
        raise NotImplementedError

    def _step(self, input_ids: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
        """Logits (batch, vocab) after these further tokens, which join the cache."""
        raise NotImplementedError


class OnnxRunner(CachingRunner):
    """Prefill and decode with ONNX Runtime on the CPU, the cache kept between calls.

    The cached tensors stay inside the runtime (OrtValue): through numpy each step would copy
    the whole past.
    """

    def __init__(self, path: Path, threads: int | None = None):
        self._session = session_of(path, threads)
        from onnxruntime import OrtValue

        self._value = OrtValue.ortvalue_from_numpy
        self._inputs = {item.name: item.shape for item in self._session.get_inputs()}
        self._outputs = [item.name for item in self._session.get_outputs()]
        self._given: dict[str, OrtValue] = {}
        """What every step reads."""
        self._past: dict[str, OrtValue] = {}

    def _forget(self, batch: int) -> None:
        self._past = self._values(empty_past(self._inputs, batch))

    def _step(self, input_ids: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
        inputs = step_inputs(input_ids, self._length, self._inputs, types)
        # Cross-attention's keys and values come with the first token alone.
        wanted = [name for name in self._outputs if not self._length or ".encoder." not in name]
        feeds = self._values(inputs) | self._given | self._past
        with _runs():
            computed = self._session.run_with_ort_values(wanted, feeds)
        present = dict(zip(wanted, computed, strict=True))
        logits = present.pop("logits")
        self._past |= {name.replace(PRESENT, PAST): value for name, value in present.items()}
        self._length += input_ids.shape[1]
        return at_the_end(logits.numpy())

    def _values(self, arrays: Mapping[str, np.ndarray]) -> dict[str, OrtValue]:
        return {name: self._value(array) for name, array in arrays.items()}
