"""One way to drive a model in any runtime: a prompt in, then token by token."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Protocol

import numpy as np

from elastic.errors import MissingExtra
from elastic.progress import say

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from elastic.search_config import TimingConfig


class Runner(Protocol):
    """A deployed causal model with its KV cache."""

    def prefill(self, input_ids: np.ndarray) -> np.ndarray:
        """(batch, prompt) int64 -> logits at the last position (batch, vocab); forgets the past."""

    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        """(batch, 1) int64 -> logits (batch, vocab), continuing from what came before."""


class TorchRunner:
    """A transformers model, called as `generate` calls it: only the last position has logits.

    Logits come back as float32 or wider; fetching them waits for the device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._cache = None

    def prefill(self, input_ids: np.ndarray) -> np.ndarray:
        self._cache = None
        return self.decode(input_ids)

    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self._fetch(self._forward(self._tensor(input_ids)))

    def _tensor(self, input_ids: np.ndarray) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(input_ids)).to(self.model.device)

    def _forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        output = self.model(
            input_ids=input_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = output.past_key_values
        return output.logits[:, -1]

    def _fetch(self, logits: torch.Tensor) -> np.ndarray:
        import torch

        return logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu().numpy()


def timed_runner(model: PreTrainedModel, timing: TimingConfig) -> TorchRunner:
    """A transformers model as it is timed: on a GPU it decodes from a graph, unless its code cannot
    be captured."""
    if model.device.type != "cuda":
        return TorchRunner(model)
    from elastic.cuda import GraphRunner

    try:
        return GraphRunner(model, timing.batch, timing.prompt_tokens + timing.new_tokens)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        say(f"{type(model).__name__} decodes without a CUDA graph, kernel by kernel: {reason}")
        return TorchRunner(model)


def require_runtime(runtime: str) -> None:
    """MissingExtra unless this runtime is installed; asked before anything slow begins."""
    if runtime == "torch":
        return
    from elastic.formats import onnx, openvino

    onnx.require()
    if runtime == "openvino":
        openvino.require()
    elif importlib.util.find_spec("onnxruntime") is None:
        raise MissingExtra("onnxruntime", "onnx", "timing.runtime onnx")


def open_runner(timing: TimingConfig, model: PreTrainedModel, directory: Path | None) -> Runner:
    """A runner for `model` in the runtime to be timed; onnx and openvino write it into `directory`
    first (float32)."""
    if timing.runtime == "torch":
        return timed_runner(model, timing)
    from elastic.formats import onnx, openvino

    graph = onnx.write(model, directory)
    if timing.runtime == "onnx":
        return onnx.OnnxRunner(graph)
    return openvino.OpenVINORunner(openvino.write(graph, directory))
