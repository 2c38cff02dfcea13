"""Turn ONNX files into OpenVINO models, stateful if they generate, and run them.

Stateful: the KV cache lives inside the model as variables and never passes through its inputs.
Inputs are input_ids, attention_mask, position_ids and beam_idx, the only output is logits: what
openvino-genai's LLMPipeline expects. Encoder-decoder models are two files, with names and
inputs of optimum-intel.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elastic.console import busy
from elastic.errors import ExportError, MissingExtra
from elastic.formats import onnx_seq2seq, tracing
from elastic.formats.onnx_session import PAST, PRESENT, CachingRunner, at_the_end, step_inputs

if TYPE_CHECKING:
    from onnx import ModelProto
    from openvino import CompiledModel, Model

    from elastic.formats.runner import Runner


FILE = "openvino_model.xml"
ENCODER, DECODER = "openvino_encoder_model.xml", "openvino_decoder_model.xml"
START = ["elastic", onnx_seq2seq.START]
PRECISIONS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def require() -> None:
    """MissingExtra unless OpenVINO models can be written here; asked before anything slow."""
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise MissingExtra("openvino", "openvino", "writing OpenVINO") from error


def write(onnx_path: Path, directory: Path) -> Path:
    """Convert `onnx_path` and write `directory/openvino_model.xml` and `.bin` in float32; of an
    encoder-decoder model the two files of optimum-intel, of which it returns the decoder's.

    Shapes: those of `elastic.formats.onnx.write`; beam_idx (batch,) names, for every row, the row
    of the previous step whose past it continues. `arange(batch)` leaves the rows in place.
    """
    require()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if Path(onnx_path).name == onnx_seq2seq.DECODER:
        return _write_pair(Path(onnx_path), directory)
    model = converted(onnx_path)
    stateful_(model, [p.any_name for p in model.inputs if p.any_name.startswith(PAST)])
    return save(model, directory / FILE)


def converted(graph: Path | ModelProto) -> Model:
    """An ONNX graph (a file, or one in memory) as OpenVINO's; ExportError names an operator that it
    does not know."""
    import openvino

    try:
        with busy("converting the graph"):
            return openvino.convert_model(graph)
    except Exception as error:  # of the frontend's own kinds
        reason = " ".join(str(error).split())[:400]
        raise ExportError(f"openvino: the graph cannot be converted: {reason}") from error


def save(model: Model, path: Path) -> Path:
    """In float32, weights beside it; ExportError where that fails."""
    import openvino

    try:
        openvino.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as error:  # it does not say why
        raise ExportError(
            f"openvino: {path} cannot be written; is the disk full? ({error})"
        ) from error
    return path


def stateful_(model: Model, past: list[str]) -> None:
    """Keep these inputs, of which every call says what they are next, inside the model."""
    if not past:
        return
    from openvino.passes import MakeStateful, Manager

    shapes = {name: model.input(name).partial_shape for name in past}
    _reorder(model, past)
    pairs = {name: name.replace(PAST, PRESENT) for name in past}
    manager = Manager()
    manager.register_pass(MakeStateful(pairs))
    manager.run_passes(model)
    # The pass names each variable by joining the two names.
    _start_empty(model, {name + pairs[name]: shape for name, shape in shapes.items()})


def _reorder(model: Model, past: list[str]) -> None:
    """Select the rows `beam_idx` of every past tensor before anything reads it."""
    from openvino import opset13 as ops

    beam_idx = ops.parameter([-1], np.int32, name="beam_idx")
    beam_idx.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([beam_idx])
    for name in past:
        port = model.input(name)
        readers = port.get_target_inputs()  # before the gather becomes one of them
        rows = ops.gather(port, beam_idx, ops.constant(np.int64(0)))
        for reader in readers:
            reader.replace_source_output(rows.output(0))
    model.validate_nodes_and_infer_types()


def _start_empty(model: Model, shapes: Mapping[str, Any]) -> None:
    """Let each variable (batch, kv_heads, past, head_dim) begin with the batch of input_ids and
    a past of 0; without it, the first `beam_idx` would look for rows in a batch of 0."""
    from openvino import opset13 as ops

    ids_shape = ops.shape_of(model.input("input_ids"), output_type="i64")
    batch = ops.gather(ids_shape, ops.constant(np.array([0], np.int64)), ops.constant(np.int64(0)))
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, head_dim = shapes[node.get_attributes()["variable_id"]]
            rest = np.array([heads.get_length(), 0, head_dim.get_length()], np.int64)
            shape = ops.concat([batch, ops.constant(rest)], axis=0)
            node.set_arguments([ops.broadcast(ops.constant(np.float32(0)), shape)])
    model.validate_nodes_and_infer_types()


def compiled_on_cpu(
    path: Path, threads: int | None = None, precision: str | None = "f32"
) -> CompiledModel:
    """The model, ready to run.

    `precision` is that of arithmetic and cache ("f32", "bf16"); None leaves both to the device,
    which rounds whatever the file holds: to bfloat16 on CPUs with AMX, and the cache to 8 bits.
    """
    require()
    import openvino

    options: dict[str, str | int] = {}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    if precision is not None:
        options["INFERENCE_PRECISION_HINT"] = options["KV_CACHE_PRECISION"] = precision
    with busy("compiling the graph"):
        return openvino.Core().compile_model(path, "CPU", options)


def precision_of(compiled: CompiledModel) -> str:
    """In which a model computes, as torch calls it."""
    name = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return PRECISIONS.get(name, name)


def _write_pair(onnx_path: Path, directory: Path) -> Path:
    """Convert the two files of `elastic.formats.onnx_seq2seq.write`, of which `onnx_path` is the
    decoder; return `directory/openvino_decoder_model.xml`.

    Shapes: the decoder's input_ids (batch, sequence), encoder_attention_mask (batch, prompt),
    encoder_hidden_states (batch, prompt, hidden), beam_idx (batch,); logits (batch, sequence,
    vocab). `beam_idx` names, for every row, the row of the previous step whose answer it continues;
    both must be answers to one prompt.
    """
    save(converted(onnx_path.with_name(onnx_seq2seq.ENCODER)), directory / ENCODER)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        graph = onnx_seq2seq.unmerged(onnx_path)
        model = converted(tracing.save(graph, Path(scratch) / onnx_seq2seq.DECODER))
        start = {entry.key: entry.value for entry in graph.metadata_props}[onnx_seq2seq.START]
        names = [port.any_name for port in model.inputs]
        stateful_(model, [name for name in names if name.startswith(PAST) and ".decoder." in name])
        _computed_once(model, [name for name in names if ".encoder." in name])
        model.set_rt_info(start, START)
        return save(model, directory / DECODER)


def _computed_once(model: Model, past: list[str]) -> None:
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


class OpenVINORunner(CachingRunner):
    """Prefill and decode with OpenVINO on the CPU, the cache kept between calls, at a `precision`
    of `compiled_on_cpu`."""

    def __init__(self, path: Path, threads: int | None = None, precision: str | None = "f32"):
        compiled = compiled_on_cpu(path, threads, precision)
        self.precision = precision_of(compiled)
        """In which it computes, as torch calls it."""
        self._request = compiled.create_infer_request()
        self._inputs = {name for item in compiled.inputs for name in item.get_names()}
        self._given: dict[str, np.ndarray] = {}
        """What every step reads."""

    def _forget(self, batch: int) -> None:
        self._request.reset_state()

    def _step(self, input_ids: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
        inputs = step_inputs(input_ids, self._length, self._inputs, types)
        logits = self._request.infer(inputs | self._given)["logits"]
        self._length += input_ids.shape[1]
        return at_the_end(logits)


class OpenVINOEncoderDecoder(OpenVINORunner):
    """The same for two files: the prompt goes to the encoder, and the decoder begins with its start
    token."""

    def __init__(self, path: Path, threads: int | None = None, precision: str | None = "f32"):
        super().__init__(path, threads, precision)
        import openvino

        encoder = compiled_on_cpu(Path(path).with_name(ENCODER), threads, precision)
        self._encoder = encoder.create_infer_request()
        # What is compiled has lost it.
        self._start = int(openvino.Core().read_model(path).get_rt_info(START).value)

    def prefill(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None
    ) -> np.ndarray:
        """Logits (batch, vocab) of the first token after the prompts (batch, prompt), of which
        those positions count whose mask is 1; forgets what came before."""
        inputs = onnx_seq2seq.prompt_inputs(input_ids, attention_mask)
        self._given = {
            "encoder_hidden_states": self._encoder.infer(inputs)["last_hidden_state"],
            "encoder_attention_mask": inputs["attention_mask"],
        }
        return super().prefill(np.full((len(input_ids), 1), self._start))


def open_runner(path: Path, threads: int | None = None, precision: str | None = "f32") -> Runner:
    """The runner for what `write` returned, or left in a folder."""
    path = graph_in(path) if path.is_dir() else path
    kind = OpenVINOEncoderDecoder if path.name == DECODER else OpenVINORunner
    return kind(path, threads, precision)


def graph_in(directory: Path) -> Path:
    """What `write` returned for this folder."""
    there = (directory / DECODER).is_file()
    return directory / (DECODER if there else FILE)
