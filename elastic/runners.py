"""One way to drive a model in any runtime: a prompt in, then token by token."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Protocol

import numpy as np

from elastic.errors import MissingExtra

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
            output = self.model(
                input_ids=torch.from_numpy(np.ascontiguousarray(input_ids)).to(self.model.device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = output.past_key_values
        logits = output.logits[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu().numpy()


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


def open_runner(runtime: str, model: PreTrainedModel, directory, *, logits: str = "last") -> Runner:
    """A runner for `model` in "torch", "onnx" or "openvino"; the latter two write it into
    `directory` first (float32)."""
    if runtime == "torch":
        return TorchRunner(model)
    from elastic.formats import onnx, openvino

    graph = onnx.write(model, directory, logits=logits)
    if runtime == "onnx":
        return onnx.OnnxRunner(graph)
    return openvino.OpenVINORunner(openvino.write(graph, directory))
