"""Graphs by the runtime that runs them: written, opened, found in a folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from elastic.console import busy
from elastic.errors import MissingExtra
from elastic.formats import onnx, openvino, tracing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODULES = {"onnx": onnx, "openvino": openvino}
"""By runtime, the module that writes a graph for it and opens one."""
PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}
"""What runs them."""


def require(runtime: str) -> None:
    """MissingExtra unless graphs can be written for this runtime, and run in it here; asked before
    anything slow."""
    with busy(f"loading {runtime}"):
        tracing.require()
        MODULES[runtime].require()
    if find_spec(PACKAGES[runtime]) is None:
        raise MissingExtra(PACKAGES[runtime], runtime, f"running {runtime} graphs")


def write(model: PreTrainedModel, directory: Path, runtime: str) -> Path:
    """A float32 graph of `model` for this runtime below `directory`."""
    graph = onnx.write(model, directory)
    return openvino.write(graph, directory) if runtime == "openvino" else graph
