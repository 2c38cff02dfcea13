"""Fewer bits per weight of a written graph: NNCF chooses the codes, the runtimes compute with them.

Every product with a weight and every embedding is compressed. In 4-bit modes neighbours in a row
share a scale; the embedding and the head get 8 bits, since most of what 4 bits cost is lost there.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elastic.config.latency import GRAPHS
from elastic.console import busy, logging_at
from elastic.data.encoding import encode_example
from elastic.errors import ConfigError, MissingExtra, require, unknown
from elastic.formats import graph_weights, onnx_seq2seq, openvino, tracing
from elastic.formats.graph_weights import Weight
from elastic.formats.graphs import MODULES
from elastic.formats.onnx_compressed import expose, lower
from elastic.formats.onnx_session import empty_past, step_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from elastic.data.task import Example


GROUP = 64
"""Channels that share a scale in 4-bit modes. Layers whose number of channels it does not divide
get the largest power of two that does; below `SMALLEST_GROUP` a layer gets 8 bits."""
SMALLEST_GROUP = 32
RUNTIMES = {Path(module.FILE).suffix: runtime for runtime, module in MODULES.items()}
"""What runs a graph, by the ending of its file."""
ENCODERS = {each.DECODER: each.ENCODER for each in (onnx_seq2seq, openvino)}


@dataclass(frozen=True)
class Mode:
    """What NNCF is asked for."""

    weights: str
    """A member of nncf.CompressWeightsMode."""
    bits: int
    options: Mapping[str, bool] = field(default_factory=dict)
    calibrated: bool = False
    """Whether it looks at activations of examples."""
    formats: tuple[str, ...] = GRAPHS


MODES = {
    "int8": Mode("INT8_ASYM", 8),
    "int8_sym": Mode("INT8_SYM", 8),
    "int4": Mode("INT4_ASYM", 4),
    "int4_sym": Mode("INT4_SYM", 4),
    "int4_awq": Mode("INT4_ASYM", 4, {"awq": True}, calibrated=True),
    "int4_scale": Mode("INT4_ASYM", 4, {"scale_estimation": True}, calibrated=True),
    "int4_gptq": Mode("INT4_ASYM", 4, {"gptq": True}, calibrated=True, formats=("openvino",)),
    "nf4": Mode("NF4", 4, formats=("openvino",)),
}
"""4 bits have a zero point unless the name says sym: SmolLM2 then keeps 73 to 74 % of its greedy
tokens, without 67 %, for 1 % more bytes."""


@dataclass(frozen=True)
class Compressed:
    """What was written, as its graph says."""

    path: Path
    mode: str
    weights: Mapping[str, Weight]
    """By the name of their layer, those of tied layers once."""
    exceptions: Mapping[str, str]
    """Layers with more bits than the mode has, and why."""
    bytes_before: int
    bytes: int
    """Of graph and weights."""

    def as_dict(self) -> dict[str, Any]:
        """For a report: the layers counted by precision and group, the exceptions by name."""
        layers = Counter(
            each.precision + (f", groups of {each.group}" if each.group is not None else "")
            for each in self.weights.values()
        )
        return {
            "mode": self.mode, "layers": dict(layers),
            "exceptions": {name: {**asdict(self.weights[name]), "reason": reason}
                           for name, reason in self.exceptions.items()},
            "bytes_before": self.bytes_before, "bytes": self.bytes,
        }  # fmt: skip


def check(mode: str, kind: str, calibration: Sequence[Inputs] | None = None) -> Mode:
    """The mode, or an error before anything is loaded: ConfigError if `kind` (onnx, openvino) has
    no such mode or it lacks examples (None: they come later), MissingExtra without NNCF."""
    if mode not in MODES:
        raise ConfigError(unknown("compression", mode, MODES))
    found = MODES[mode]
    if kind not in found.formats:
        known = ", ".join(name for name, each in MODES.items() if kind in each.formats)
        raise ConfigError(
            f"compression {mode!r}: NNCF has it for {' and '.join(found.formats)} alone, not for "
            f"{kind}; there: {known}"
        )
    require(
        calibration is None or bool(calibration) or not found.calibrated,
        f"compression {mode!r} looks at activations and got no examples to compute them from",
    )
    if find_spec("nncf") is None:
        raise MissingExtra("nncf", "compress", "compressing weights")
    MODULES[kind].require()
    return found


def compress(
    graph: Path,
    directory: Path,
    mode: str,
    calibration: Sequence[Inputs] = (),
    *,
    group: int = GROUP,
) -> Compressed:
    """Write the compressed `graph` under its own name into `directory`, which may be its own.

    `graph` is `openvino_model.xml` or `model.onnx` as `elastic.formats` writes them, or the decoder
    of a pair, whose encoder is compressed with it; `calibration` are the inputs of
    `calibration_inputs`. The runners read the result. ConfigError and
    MissingExtra as `check` raises them.
    """
    graph, directory = Path(graph), Path(directory)
    if graph.suffix not in RUNTIMES:
        raise ConfigError(f"{graph}: wanted a file that ends in {' or '.join(RUNTIMES)}")
    kind = RUNTIMES[graph.suffix]
    found = check(mode, kind, calibration)
    require(
        group >= SMALLEST_GROUP and group & (group - 1) == 0,
        f"compression {mode!r}: group {group} is no power of two from {SMALLEST_GROUP} upwards",
    )
    graphs = [graph.with_name(ENCODERS[graph.name]), graph] if graph.name in ENCODERS else [graph]
    require(
        len(graphs) == 1 or not found.calibrated,
        f"compression {mode!r} looks at activations, which are not computed for the two graphs of "
        "an encoder-decoder model; give a mode that does not",
    )
    before = sum(map(_size, graphs))
    directory.mkdir(parents=True, exist_ok=True)
    samples = calibration if found.calibrated else ()
    weights: dict[str, Weight] = {}
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        write = {"onnx": _onnx, "openvino": _openvino}[kind]
        for each in graphs:
            weights |= write(each, Path(scratch) / each.name, found, samples, group)
        for each in graphs:
            for stale in _files(directory / each.name):
                stale.unlink(missing_ok=True)
        for file in Path(scratch).iterdir():
            os.replace(file, directory / file.name)
    after = sum(_size(directory / each.name) for each in graphs)
    path = directory / graph.name
    return Compressed(path, mode, weights, _exceptions(weights, found), before, after)


def _openvino(
    graph: Path, written: Path, mode: Mode, samples: Sequence[Inputs], group: int
) -> dict[str, Weight]:
    import openvino

    core = openvino.Core()
    model = core.read_model(graph)
    shapes = {
        port.any_name: tuple(
            axis.get_length() if axis.is_static else -1 for axis in port.partial_shape
        )
        for port in model.inputs
    }
    model = _compressed(model, mode, [completed(each, shapes) for each in samples], group)
    openvino.save_model(model, written, compress_to_fp16=False)
    return graph_weights.in_openvino(core.read_model(written))


def _onnx(
    graph: Path, written: Path, mode: Mode, samples: Sequence[Inputs], group: int
) -> dict[str, Weight]:
    import onnx as library

    paired = graph.name == onnx_seq2seq.DECODER
    model = onnx_seq2seq.unmerged(graph) if paired else library.load(graph)
    shapes = {
        item.name: tuple(axis.dim_value for axis in item.type.tensor_type.shape.dim)
        for item in model.graph.input
    }
    tied = expose(model)
    inputs = [completed(each, shapes) for each in samples]
    with tempfile.TemporaryDirectory(dir=written.parent) as outside:
        if large := _size(graph) > tracing.SINGLE_FILE_BYTES:  # no graph with its weights then
            library.save(
                model, f"{outside}/{graph.name}", save_as_external_data=True, location="weights"
            )
            model = library.load(f"{outside}/{graph.name}", load_external_data=False)
        model = _compressed(model, mode, inputs, group, tied, outside if large else None)
    lower(model)
    weights = graph_weights.in_onnx(model)
    model = onnx_seq2seq.remerged(model) if paired else model
    tracing.save(model, written)
    return weights


def _compressed(
    model: Any, mode: Mode, samples: list[Inputs], group: int, ignored: Sequence[str] = (),
    outside: str | None = None,
) -> Any:  # fmt: skip
    """The model as NNCF leaves it; `outside` is the folder of an ONNX graph's weights."""
    import nncf

    options: dict[str, Any] = dict(mode.options)
    advanced = nncf.AdvancedCompressionParameters(
        group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST,
        min_adjusted_group_size=SMALLEST_GROUP,
        backend_params={"external_data_dir": outside} if outside else {},
    )
    options["advanced_parameters"] = advanced
    if mode.bits < 8:
        options["group_size"] = group
    if samples:
        options |= {"dataset": nncf.Dataset(samples), "subset_size": len(samples)}
    if ignored:
        options["ignored_scope"] = nncf.IgnoredScope(names=list(ignored))
    with _quiet():
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode[mode.weights], **options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without its bars and tables, which would go to stdout: it does several things of which none
    is known before."""
    with (
        logging_at("nncf", logging.ERROR),
        contextlib.redirect_stdout(io.StringIO()),
        busy("compressing weights"),
    ):
        yield


def _exceptions(weights: Mapping[str, Weight], mode: Mode) -> dict[str, str]:
    found = {}
    for name, weight in weights.items():
        channels = weight.shape[-1]
        if weight.bits <= mode.bits:
            continue
        if weight.precision.startswith("float"):
            found[name] = "NNCF does not see it as a weight"
        elif channels & -channels < SMALLEST_GROUP:
            found[name] = f"no group of {SMALLEST_GROUP} or more divides its {channels} channels"
        else:
            found[name] = "an embedding or the head"
    return found


def _files(path: Path) -> tuple[Path, Path]:
    """The graph and what may lie beside it."""
    return path, path.with_suffix(".bin") if path.suffix == ".xml" else Path(f"{path}.data")


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path) if file.is_file())


Inputs = dict[str, np.ndarray]


def calibration_inputs(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, examples: Iterable[Example]
) -> list[Inputs]:
    """One per example: input_ids and attention_mask (1, length), and token_type_ids where the model
    tells sentences apart. Prompt and answer of a language model, without the token that ends it,
    which no model reads; the text of a classifier."""
    found = []
    for example in examples:
        encoded = encode_example(tokenizer, model, example)
        ids = encoded.ids[:-1] if encoded.label is None else encoded.ids
        inputs = {"input_ids": np.array([ids], np.int64)}
        inputs["attention_mask"] = np.ones_like(inputs["input_ids"])
        if encoded.types:
            inputs["token_type_ids"] = np.array([encoded.types], np.int64)
        found.append(inputs)
    return found


def completed(inputs: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> Inputs:
    """All that a graph of `elastic.formats` with inputs of these shapes reads for these tokens,
    with nothing before them."""
    ids = inputs["input_ids"]
    found = step_inputs(ids, 0, shapes) | empty_past(shapes, len(ids))
    return found | {name: array for name, array in inputs.items() if name in shapes}
