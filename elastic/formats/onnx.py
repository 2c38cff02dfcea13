"""Write a language model as ONNX with a KV cache, or a classifier without one, and run it.

Of a decoder the same graph does prefill (past of length 0) and decode: batch, sequence and past are
all dynamic. KV heads may differ from layer to layer, as they do in a slice. Encoder-decoder models
are two graphs, of `elastic.formats.onnx_seq2seq`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from elastic.errors import ConfigError, unknown
from elastic.formats import onnx_seq2seq
from elastic.formats.onnx_decoder import _decoder
from elastic.formats.onnx_session import at_the_end, session_of, step_inputs
from elastic.formats.tracing import Trace, require, require_float32, traceable, write_traced
from elastic.models.kinds import Kind, has_types, kind_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from elastic.formats.runner import Runner


__all__ = ["FILE", "OnnxRunner", "open_runner", "require", "write"]
FILE = "model.onnx"


def write(model: PreTrainedModel, directory: Path, *, logits: str = "last") -> Path:
    """Write `directory/model.onnx` (and `model.onnx.data` past 2 GB); return its path.

    `logits` chooses where the head is computed: "last" is what generation needs and spares
    most of the head's prefill time, "all" is what scoring needs.

    Shapes: input_ids, position_ids (batch, sequence); attention_mask (batch, past + sequence);
    past_key_values.N.key and .value (batch, kv_heads, past, head_dim), present.N.* the same with
    past + sequence; logits (batch, 1 or sequence, vocab). Of a classifier: input_ids,
    attention_mask and, where the model has them, token_type_ids (batch, sequence); logits
    (batch, classes). Of an encoder-decoder model: see `elastic.formats.onnx_seq2seq.write`.
    ExportError names what cannot be traced.
    """
    require()
    if logits not in ("last", "all"):
        raise ConfigError(unknown("logits", logits, ("all", "last")))
    require_float32(model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    kind = kind_of(model)
    if kind is Kind.ENCODER_DECODER:
        return onnx_seq2seq.write(model, directory, logits=logits)
    with traceable(model):
        trace = _classifier(model) if kind is Kind.CLASSIFIER else _decoder(model, logits)
        return write_traced(trace, directory / FILE)


def _classifier(model: PreTrainedModel) -> Trace:
    import torch

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Tensor) -> Tensor:
            return self.model(**dict(zip(inputs, tensors, strict=True))).logits

    inputs = ["input_ids", "attention_mask"]
    if has_types(model):
        inputs.append("token_type_ids")
    # Neither axis 1: the tracer would take that for a constant.
    example = tuple(torch.ones(2, 3, dtype=torch.long, device=model.device) for _ in inputs)
    dynamic = {name: {0: "batch", 1: "sequence"} for name in inputs} | {"logits": {0: "batch"}}
    return Trace(Flat(), example, inputs, ["logits"], dynamic)


def open_runner(path: Path, threads: int | None = None) -> Runner:
    """The runner for what `write` returned."""
    pair = Path(path).name == onnx_seq2seq.DECODER
    return (onnx_seq2seq.OnnxEncoderDecoder if pair else OnnxRunner)(path, threads)


def graph_in(directory: Path) -> Path:
    """What `write` returned for this folder."""
    there = (directory / onnx_seq2seq.DECODER).is_file()
    return directory / (onnx_seq2seq.DECODER if there else FILE)


def open_folder(directory: Path, threads: int | None = None) -> Runner:
    """The runner for what `write` left in a folder."""
    return open_runner(graph_in(directory), threads)


class OnnxRunner:
    """Prefill and decode with ONNX Runtime on the CPU, the cache kept between calls.

    The cached tensors stay inside the runtime (OrtValue): through numpy each step would copy
    the whole past.
    """

    def __init__(self, path: Path, threads: int | None = None):
        self._session = session_of(path, threads)
        from onnxruntime import OrtValue

        self._value = OrtValue.ortvalue_from_numpy
        self._past_shapes = {
            item.name: item.shape
            for item in self._session.get_inputs()
            if item.name.startswith("past_key_values.")
        }
        self._inputs = {item.name for item in self._session.get_inputs()}
        self._outputs = [item.name for item in self._session.get_outputs()]
        self._past: dict[str, OrtValue] = {}
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
