"""Write a language model as ONNX with a KV cache, or a classifier without one, and run it.

Of a decoder the same graph does prefill (past of length 0) and decode: batch, sequence and past are
all dynamic. KV heads may differ from layer to layer, as they do in a slice. Encoder-decoder models
are two graphs, of `elastic.formats.onnx_seq2seq`. Of a model that reads pictures, too, its language
model alone is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from elastic.errors import ConfigError, unknown
from elastic.formats import onnx_seq2seq, tracing
from elastic.formats.onnx_decoder import decoder_trace
from elastic.formats.onnx_session import OnnxRunner
from elastic.formats.text_only import as_text
from elastic.formats.tracing import Flat, Trace, require
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
    ConfigError for another type of weights; ExportError names what cannot be traced.
    """
    require()
    if logits not in ("last", "all"):
        raise ConfigError(unknown("logits", logits, ("all", "last")))
    tracing.require_float32(model)
    model = as_text(model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    kind = kind_of(model)
    if kind is Kind.ENCODER_DECODER:
        with tracing.refusing(type(model)):
            return onnx_seq2seq.write(model, directory, logits=logits)
    with tracing.refusing(type(model)), tracing.traceable(model):
        trace = _classifier(model) if kind is Kind.CLASSIFIER else decoder_trace(model, logits)
        return tracing.write_traced(trace, directory / FILE)


def _classifier(model: PreTrainedModel) -> Trace:
    def call(*tensors: Tensor) -> Tensor:
        return model(**dict(zip(inputs, tensors, strict=True))).logits

    inputs = ["input_ids", "attention_mask"]
    if has_types(model):
        inputs.append("token_type_ids")
    # Neither axis 1: the tracer would take that for a constant.
    example = tuple(tracing.ones(model, 2, 3) for _ in inputs)
    dynamic = {name: {0: "batch", 1: "sequence"} for name in inputs} | {"logits": {0: "batch"}}
    return Trace(Flat(call, model=model), example, inputs, ["logits"], dynamic)


def open_runner(path: Path, threads: int | None = None) -> Runner:
    """The runner for what `write` returned, or left in a folder."""
    path = graph_in(path) if path.is_dir() else path
    pair = path.name == onnx_seq2seq.DECODER
    return (onnx_seq2seq.OnnxEncoderDecoder if pair else OnnxRunner)(path, threads)


def graph_in(directory: Path) -> Path:
    """What `write` returned for this folder."""
    there = (directory / onnx_seq2seq.DECODER).is_file()
    return directory / (onnx_seq2seq.DECODER if there else FILE)
