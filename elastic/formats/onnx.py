"""Write a causal language model as one ONNX graph with a KV cache, or a classifier as one
without, and run it.

The same graph does prefill (past of length 0) and decode: batch, sequence and past are all
dynamic. KV heads may differ from layer to layer, as they do in a slice.

The graph is traced by PyTorch's TorchScript exporter, the older of its two, on purpose: the
symbolic shapes of the newer one cost 160 s on SmolLM2's 30 layers, tracing costs 10 to 17 s. What
a trace cannot follow are rotary embeddings whose frequencies depend on the prompt length
(`dynamic` and `longrope` scaling).
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from elastic.classifier import classes_of, has_types
from elastic.errors import ConfigError, ExportError, MissingExtra, unknown

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

FILE = "model.onnx"
OPSET = 18
SINGLE_FILE_BYTES = 2**31 - 2**24
"""Weights above this go to `model.onnx.data`: protobuf ends at 2 GiB, graph included."""


def require() -> None:
    """MissingExtra unless ONNX can be written here; asked before anything slow begins."""
    try:
        import onnx  # noqa: F401  the exporter fails without it, but only after the trace
    except ImportError as error:
        raise MissingExtra("onnx", "onnx", "writing ONNX") from error


def cache_names(side: str, layers: int) -> list[str]:
    """`side.0.key, side.0.value, side.1.key, ...`, as onnxruntime-genai and openvino expect."""
    return [f"{side}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def write(model: PreTrainedModel, directory: Path, *, logits: str = "last") -> Path:
    """Write `directory/model.onnx` (and `model.onnx.data` past 2 GB); return its path.

    `logits` chooses where the head is computed: "last" is what generation needs and spares
    most of the head's prefill time, "all" is what scoring needs.

    Shapes: input_ids, position_ids (batch, sequence); attention_mask (batch, past + sequence);
    past_key_values.N.key and .value (batch, kv_heads, past, head_dim), present.N.* the same with
    past + sequence; logits (batch, 1 or sequence, vocab). Of a classifier: input_ids,
    attention_mask and, where the model has them, token_type_ids (batch, sequence); logits
    (batch, classes). ExportError names what cannot be traced.
    """
    import torch

    require()
    if logits not in ("last", "all"):
        raise ConfigError(unknown("logits", logits, ("all", "last")))
    if model.dtype != torch.float32:
        raise ConfigError(f"onnx: wanted a float32 model, got {model.dtype}; call model.float()")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)

    with _traced_attention(model), torch.no_grad():
        if classes_of(model):
            return _traced(_classifier(model), directory)
        names, example = _example(model)
        layers = len(names) // 2
        outputs = ["logits", *cache_names("present", layers)]
        inputs = ["input_ids", "attention_mask", "position_ids", *names]
        dynamic = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "position_ids")}
        dynamic |= {"attention_mask": {0: "batch", 1: "total"}}
        dynamic |= {name: {0: "batch", 2: "past"} for name in names}
        dynamic |= {name: {0: "batch", 2: "total"} for name in outputs[1:]}
        dynamic |= {"logits": {0: "batch"} if logits == "last" else {0: "batch", 1: "sequence"}}
        flat = _flat(model, logits)
        return _traced(_Trace(flat, example, inputs, outputs, dynamic), directory)


@dataclass(frozen=True)
class _Trace:
    """What is traced, with what, and what the graph calls it."""

    module: nn.Module
    example: tuple[Tensor, ...]
    inputs: Sequence[str]
    outputs: Sequence[str]
    dynamic: Mapping[str, Mapping[int, str]]


def _traced(trace: _Trace, directory: Path) -> Path:
    import torch

    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        with warnings.catch_warnings():
            # The exporter's own deprecation, and the tracer on branches over Python ints.
            warnings.simplefilter("ignore")
            try:
                torch.onnx.export(
                    trace.module,
                    trace.example,
                    os.path.join(scratch, FILE),
                    input_names=trace.inputs,
                    output_names=trace.outputs,
                    dynamic_axes=trace.dynamic,
                    opset_version=OPSET,
                    dynamo=False,
                    # Folding would store each tied head a second time, transposed.
                    do_constant_folding=False,
                )
            except OSError:  # a full disk
                raise
            except Exception as error:  # what a model's own code raises is of any kind
                raise ExportError(
                    f"onnx: {type(trace.module.model).__name__} cannot be traced: "
                    f"{' '.join(str(error).split())[:400] or type(error).__name__}"
                ) from error
        return _settle(Path(scratch), directory)


def _classifier(model: PreTrainedModel) -> _Trace:
    import torch

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *tensors):
            return self.model(**dict(zip(inputs, tensors, strict=True))).logits

    inputs = ["input_ids", "attention_mask"]
    if has_types(model):
        inputs.append("token_type_ids")
    # Neither axis 1: the tracer would take that for a constant.
    example = tuple(torch.ones(2, 3, dtype=torch.long, device=model.device) for _ in inputs)
    dynamic = {name: {0: "batch", 1: "sequence"} for name in inputs} | {"logits": {0: "batch"}}
    return _Trace(Flat(), example, inputs, ["logits"], dynamic)


@contextmanager
def _traced_attention(model: PreTrainedModel):
    """Eager attention in evaluation mode, restored on exit.

    OpenVINO recognises the eager form and fuses it with the cached past; the exporter's rendering
    of fused attention it does not (SmolLM2 after 256 tokens: decode 21 ms against 36).
    """
    implementation, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        model.set_attn_implementation(implementation)


def _example(model: PreTrainedModel):
    """Names of the cached tensors and sample arguments to trace with, none of their axes 0 or 1."""
    import torch

    batch, sequence = 2, 3
    ids = torch.ones(batch, sequence, dtype=torch.long, device=model.device)
    past = [
        tensor
        for layer in model(input_ids=ids, use_cache=True).past_key_values.layers
        for tensor in (layer.keys, layer.values)
    ]
    length = past[0].shape[2]
    mask = torch.ones(batch, length + sequence, dtype=torch.long, device=model.device)
    positions = torch.arange(length, length + sequence, device=model.device).repeat(batch, 1)
    return cache_names("past_key_values", len(past) // 2), (ids, mask, positions, *past)


def _flat(model: PreTrainedModel, logits: str) -> nn.Module:
    """The model as a function of tensors alone: no cache object enters or leaves."""
    import torch
    from transformers.cache_utils import Cache, DynamicLayer

    def filled(keys, values):
        # Not `update`: it would concatenate to an untyped empty tensor, which OpenVINO refuses.
        layer = DynamicLayer()
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        layer.dtype, layer.device = keys.dtype, keys.device
        return layer

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, position_ids, *past):
            cache = Cache(
                layers=[filled(*pair) for pair in zip(past[0::2], past[1::2], strict=True)]
            )
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1 if logits == "last" else 0,
            )
            pairs = ((layer.keys, layer.values) for layer in output.past_key_values.layers)
            return output.logits, *(tensor for pair in pairs for tensor in pair)

    return Flat()


def _settle(scratch: Path, directory: Path) -> Path:
    """Move the exported file to `directory`, its weights beside it where protobuf cannot hold them.

    The location inside the file is relative, so the directory may be renamed afterwards.
    """
    path, data = directory / FILE, directory / f"{FILE}.data"
    data.unlink(missing_ok=True)
    if sum(file.stat().st_size for file in scratch.iterdir()) <= SINGLE_FILE_BYTES:
        os.replace(scratch / FILE, path)
        return path
    import onnx

    graph = onnx.load(scratch / FILE)
    path.unlink(missing_ok=True)
    onnx.save(graph, path, save_as_external_data=True, location=data.name)
    return path


class OnnxRunner:
    """Prefill and decode with ONNX Runtime on the CPU, the cache kept between calls.

    The cached tensors stay inside the runtime (OrtValue): through numpy each step would copy
    the whole past.
    """

    def __init__(self, path: Path, threads: int | None = None):
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtra("onnxruntime", "onnx", "running ONNX models") from error

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0  # 0: one per physical core
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._past_shapes = {
            item.name: item.shape
            for item in self._session.get_inputs()
            if item.name.startswith("past_key_values.")
        }
        self._inputs = {item.name for item in self._session.get_inputs()}
        self._outputs = [item.name for item in self._session.get_outputs()]
        self._past: dict[str, onnxruntime.OrtValue] = {}
        self._length = 0

    def prefill(self, input_ids: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
        """Logits (batch, vocab) after the prompts (batch, prompt); forgets what came before."""
        batch, self._length = len(input_ids), 0
        self._past = {
            name: self._value(np.zeros((batch, heads, 0, head_dim), np.float32))
            for name, (_, heads, _, head_dim) in self._past_shapes.items()
        }
        return self._step(input_ids, types)

    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        """Logits (batch, vocab) after one more token each, (batch, 1)."""
        return self._step(input_ids)

    def _step(self, input_ids: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
        inputs = step_inputs(input_ids, self._length, self._inputs, types)
        feeds = {name: self._value(array) for name, array in inputs.items()} | self._past
        logits, *present = self._session.run_with_ort_values(self._outputs, feeds)
        self._past = dict(zip(self._past_shapes, present, strict=True))
        self._length += input_ids.shape[1]
        return at_the_end(logits.numpy())


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
