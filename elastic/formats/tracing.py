"""How a graph is traced and stored: the TorchScript exporter, eager attention, one file or two.

`torch.onnx` has an older and a newer exporter. The older one is taken on purpose: the symbolic
shapes of the newer one, and of `transformers.exporters`, which is built upon it, cost 160 s on
SmolLM2's 30 layers; tracing costs 10 to 17 s. What a trace cannot follow are rotary embeddings
whose frequencies depend on the prompt length (`dynamic` and `longrope` scaling).
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elastic.console import busy
from elastic.errors import ConfigError, ElasticError, ExportError, MissingExtra
from elastic.formats.traced_experts import written_out
from elastic.formats.translations import translated
from elastic.models.modules import evaluating

if TYPE_CHECKING:
    from onnx import ModelProto
    from transformers import PreTrainedModel

OPSET = 18
SINGLE_FILE_BYTES = 2**31 - 2**24
"""Weights above this go to a file of their own: protobuf ends at 2 GiB, graph included."""


@dataclass(frozen=True)
class Trace:
    """What is traced, with what, and what the graph calls it."""

    module: nn.Module
    example: tuple[Tensor, ...]
    inputs: Sequence[str]
    outputs: Sequence[str]
    dynamic: Mapping[str, Mapping[int, str]]


class Flat(nn.Module):
    """A function of tensors alone as the module that is traced: no cache object enters or leaves.
    Weights are named after the `modules` that it calls."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def ones(model: PreTrainedModel, *shape: int) -> Tensor:
    """Token ids, or a mask, to trace with."""
    return torch.ones(*shape, dtype=torch.long, device=model.device)


def require() -> None:
    """MissingExtra unless ONNX can be written here; asked before anything slow begins."""
    try:
        import onnx  # noqa: F401  the exporter fails without it, but only after the trace
    except ImportError as error:
        raise MissingExtra("onnx", "onnx", "writing ONNX") from error


def require_float32(model: PreTrainedModel) -> None:
    """ConfigError for a model of another type, which runtimes on the CPU compute otherwise."""
    if model.dtype != torch.float32:
        raise ConfigError(f"onnx: wanted a float32 model, got {model.dtype}; call model.float()")


@contextmanager
def traceable(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention in evaluation mode without gradients, restored on exit.

    OpenVINO recognises the eager form and fuses it with the cached past; the exporter's rendering
    of fused attention it does not (SmolLM2 after 256 tokens: decode 21 ms against 36).
    """
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with evaluating(model), torch.no_grad(), written_out(model):
            yield
    finally:
        model.set_attn_implementation(implementation)


def write_traced(trace: Trace, path: Path) -> Path:
    """Trace into `path` (and `path.data` past 2 GB, which protobuf cannot hold)."""
    import onnx

    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        file = Path(scratch) / path.name
        _export(trace, file)
        if sum(part.stat().st_size for part in file.parent.iterdir()) > SINGLE_FILE_BYTES:
            return save(onnx.load(file), path)
        _data_of(path).unlink(missing_ok=True)
        os.replace(file, path)
        return path


def traced(trace: Trace, folder: Path) -> ModelProto:
    """Trace into memory, weights included, by way of a file in a folder that goes away again."""
    import onnx

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _export(trace, Path(scratch) / "model.onnx")
        return onnx.load(Path(scratch) / "model.onnx")


def _export(trace: Trace, path: Path) -> None:
    with warnings.catch_warnings(), _muted(), translated(OPSET), busy("tracing the graph"):
        # The exporter's own deprecation, and the tracer on branches over Python ints.
        warnings.simplefilter("ignore")
        with refusing(type(next(trace.module.children()))):
            torch.onnx.export(
                trace.module,
                trace.example,
                str(path),
                input_names=trace.inputs,
                output_names=trace.outputs,
                dynamic_axes=trace.dynamic,
                opset_version=OPSET,
                dynamo=False,
                # Folding would store each tied head a second time, transposed.
                do_constant_folding=False,
            )


@contextmanager
def refusing(kind: type[nn.Module]) -> Iterator[None]:
    """ExportError for whatever the code of a model of this class raises while it is called or
    traced."""
    try:
        yield
    except (ElasticError, OSError):  # a full disk
        raise
    except Exception as error:  # what a model's own code raises is of any kind
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise ExportError(
            f"onnx: {kind.__name__} cannot be traced: {reason}; hf and peft need no trace"
        ) from error


@contextmanager
def _muted() -> Iterator[None]:
    """Without the graph that torch's C++ prints, when it fails, where results are printed."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def save(graph: ModelProto, path: Path) -> Path:
    """Write a graph with its weights; those past 2 GB beside it.

    The location inside the file is relative, so the directory may be renamed afterwards.
    """
    import onnx

    data = _data_of(path)
    for file in (path, data):
        file.unlink(missing_ok=True)
    apart = _is_large(graph)
    onnx.save(graph, path, save_as_external_data=apart, location=data.name if apart else None)
    return path


def _is_large(graph: ModelProto) -> bool:
    from google.protobuf.message import EncodeError

    try:
        return graph.ByteSize() > SINGLE_FILE_BYTES
    except EncodeError:  # past 2 GiB not even the size is told
        return True


def _data_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")
