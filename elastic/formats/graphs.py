"""Graphs by the runtime that runs them: written, opened, found in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from elastic.formats import onnx, openvino
from elastic.formats.compression import compress as compressed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from elastic.formats.runner import Runner

GRAPHS = {"onnx": onnx, "openvino": openvino}
"""What can run a graph, and the module that writes and opens one for it."""


def write(
    model: PreTrainedModel, directory: Path, runtime: str, compress: str | None = None
) -> Path:
    """A graph of `model` for this runtime below `directory`: float32, or with weights compressed in
    a mode of `elastic.formats.compression.MODES`."""
    graph = onnx.write(model, directory)
    if runtime == "openvino":
        graph = openvino.write(graph, directory)
    return compressed(graph, directory / compress, compress).path if compress else graph


def open_written(directory: Path, runtime: str) -> Runner:
    """A runner for the graph that was written into `directory` for this runtime."""
    return GRAPHS[runtime].open_folder(directory)
