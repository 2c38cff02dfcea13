"""Graphs for ONNX Runtime and OpenVINO."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch

from elastic.errors import ExportError, MissingExtra
from elastic.formats import onnx, openvino, tracing
from elastic.formats.runner import Runner
from elastic.models import kinds
from elastic.writers.base import Format, Source, Which


class Onnx(Format):
    runtime = "onnx"

    def require(self) -> None:
        tracing.require()
        if importlib.util.find_spec("onnxruntime") is None:
            raise MissingExtra("onnxruntime", "onnx", "running ONNX models")

    def why_not(self, source: Source) -> str | None:
        return kinds.no_graph(source.models["compact"].config)

    def write(self, source: Source, which: Which, directory: Path) -> None:
        model = source.models[which]
        wide = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
        onnx.write(wide, directory, logits=source.config.logits)
        source.accompany(which, directory, "onnx")

    def open(self, source: Source, which: Which, directory: Path) -> Runner:
        return onnx.open_folder(directory)

    def about(self, source: Source, directory: Path) -> dict[str, Any]:
        return {"pipelines": source.pipelines[directory]}


class Openvino(Format):
    """Compared in float32, run at the precision that the device chooses."""

    runtime = "openvino"

    def require(self) -> None:
        tracing.require()
        openvino.require()

    def why_not(self, source: Source) -> str | None:
        return kinds.no_graph(source.models["compact"].config)

    def write(self, source: Source, which: Which, directory: Path) -> None:
        try:
            graph = source.folder("onnx", which)
        except ExportError as error:
            raise ExportError(f"openvino, by way of {error}") from error
        openvino.write(onnx.graph_in(graph), directory)
        source.accompany(which, directory, "openvino")

    def open(self, source: Source, which: Which, directory: Path) -> Runner:
        return openvino.open_folder(directory, precision=None)

    def exact(self, source: Source, directory: Path, runner: Runner) -> Runner:
        return openvino.open_folder(directory)

    def precision(self, source: Source, runner: Runner) -> str:
        return runner.precision

    def about(self, source: Source, directory: Path) -> dict[str, Any]:
        return {"pipelines": source.pipelines[directory]}
