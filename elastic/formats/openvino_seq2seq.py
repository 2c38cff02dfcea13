"""An encoder-decoder model as two OpenVINO models, and a runner for them.

Files and inputs are those of optimum-intel. The decoder is stateful: the keys and values of
self-attention grow inside, those of cross-attention are computed when its state is empty.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from elastic.formats import seq2seq, tracing
from elastic.formats.openvino import (
    PAST,
    PRESENT,
    compiled_on_cpu,
    converted,
    precision_of,
    require,
    save,
    stateful_,
)

ENCODER, DECODER = "openvino_encoder_model.xml", "openvino_decoder_model.xml"
START = ["elastic", seq2seq.START]


def write(onnx_path: Path, directory: Path) -> Path:
    """Convert the two files of `elastic.formats.seq2seq.write`, of which `onnx_path` is the
    decoder; return `directory/openvino_decoder_model.xml`.

    Shapes: the decoder's input_ids (batch, sequence), encoder_attention_mask (batch, prompt),
    encoder_hidden_states (batch, prompt, hidden), beam_idx (batch,); logits (batch, sequence,
    vocab). `beam_idx` names, for every row, the row of the previous step whose answer it continues;
    both must be answers to one prompt.
    """
    save(converted(onnx_path.with_name(seq2seq.ENCODER)), directory / ENCODER)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        graph = seq2seq.unmerged(onnx_path)
        model = converted(tracing.save(graph, Path(scratch) / seq2seq.DECODER))
        start = {entry.key: entry.value for entry in graph.metadata_props}[seq2seq.START]
        names = [port.any_name for port in model.inputs]
        stateful_(model, [name for name in names if name.startswith(PAST) and ".decoder." in name])
        _computed_once(model, [name for name in names if ".encoder." in name])
        model.set_rt_info(start, START)
        return save(model, directory / DECODER)


def _computed_once(model, past: list[str]) -> None:
    """Turn each of these inputs into a variable that begins as the output of its name says."""
    from openvino import opset13 as ops

    for name in past:
        port, result = model.input(name), model.output(name.replace(PAST, PRESENT))
        source = result.get_node().input_value(0)
        variable = name.replace(PAST, "")
        held = ops.read_value(source, variable, source.get_element_type(), port.partial_shape)
        for reader in port.get_target_inputs():
            reader.replace_source_output(held.output(0))
        model.add_sinks([ops.assign(held, variable)])
        model.remove_result(result.get_node())
        model.remove_parameter(port.get_node())


class OpenVINOEncoderDecoder:
    """Prefill and decode with OpenVINO on the CPU: the prompt goes to the encoder, and the decoder
    begins with its start token; at a `precision` of `elastic.formats.openvino.compiled_on_cpu`."""

    def __init__(self, path: Path, threads: int | None = None, precision: str | None = "f32"):
        require()
        import openvino

        path = Path(path)
        encoder, decoder = (
            compiled_on_cpu(file, threads, precision) for file in (path.with_name(ENCODER), path)
        )
        self.precision = precision_of(decoder)
        """In which it computes, as torch calls it."""
        # What is compiled has lost it.
        self._start = int(openvino.Core().read_model(path).get_rt_info(START).value)
        self._encoder, self._decoder = (
            encoder.create_infer_request(),
            decoder.create_infer_request(),
        )
        self._given: dict[str, np.ndarray] = {}

    def prefill(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None
    ) -> np.ndarray:
        """Logits (batch, vocab) of the first token after the prompts (batch, prompt), of which
        those positions count whose mask is 1; forgets what came before."""
        inputs = seq2seq.prompt_inputs(input_ids, attention_mask)
        self._given = {
            "encoder_hidden_states": self._encoder.infer(inputs)["last_hidden_state"],
            "encoder_attention_mask": inputs["attention_mask"],
            "beam_idx": np.arange(len(input_ids), dtype=np.int32),
        }
        self._decoder.reset_state()
        return self.decode(np.full((len(input_ids), 1), self._start))

    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        """Logits (batch, vocab) after one more token each, (batch, 1)."""
        ids = np.ascontiguousarray(input_ids, dtype=np.int64)
        return self._decoder.infer({"input_ids": ids, **self._given})["logits"][:, -1]
