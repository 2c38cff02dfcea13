"""What timing on an NVIDIA GPU needs beside a model."""

from __future__ import annotations

import contextlib
import copy
import csv
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, StaticCache

from elastic.formats.runner import TorchRunner

WARM_UP = 3
"""Steps before a graph is captured, which libraries use to choose and load their kernels."""
_STATE = {
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
    "throttle_reasons": "clocks_throttle_reasons.active",
}


class CudaClock:
    """Seconds on the GPU's own clock: an event is recorded and waited for at every reading."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._now = 0.0
        self._last = self._event()

    def __call__(self) -> float:
        # From one reading to the next: an event counts in single precision.
        event = self._event()
        self._now += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._now

    def _event(self) -> torch.cuda.Event:
        with _on(self._device):
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch gives it none
            event.record()
            event.synchronize()
        return event


class GraphRunner(TorchRunner):
    """Decodes by replaying one captured step over a cache of fixed size, as servers do: no step
    waits for Python to launch its kernels. Prefill is launched kernel by kernel."""

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        tokens: int,
        capture: Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]] | None = None,
    ) -> None:
        """For `batch` sequences of at most `tokens` in all. `capture` turns a step into its replay,
        which writes into the tensor that it returns."""
        super().__init__(model)
        self._cache = StaticCache(_unwindowed(model), max_cache_len=max(tokens, WARM_UP + 2))
        self._token = torch.zeros((batch, 1), dtype=torch.int64, device=model.device)
        with torch.inference_mode():
            self._forward(self._token)  # makes the cache
            with _on(model.device):
                self._replay = (capture or graph_of)(lambda: self._forward(self._token))

    def prefill(self, input_ids: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
        with torch.inference_mode():
            self._cache.reset()
            return self._fetch(self._forward(self._tensor(input_ids)))

    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            self._token.copy_(self._tensor(input_ids))
            return self._fetch(self._replay())


def _on(device: torch.device | None) -> contextlib.AbstractContextManager[Any]:
    """Streams, events and graphs belong to the current GPU, whichever tensors are on."""
    if device is None or device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _unwindowed(model: PreTrainedModel) -> PretrainedConfig:
    """A config whose cache keeps everything: layers of a sliding window would count in Python,
    which a graph cannot follow. What they may see, the mask decides."""
    config = copy.deepcopy(model.config.get_text_config(decoder=True))
    config.sliding_window = None
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    return config


def graph_of(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Capture a step into a CUDA graph, warmed up on a stream of its own."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call] # torch gives it none
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph, device = torch.cuda.CUDAGraph(), torch.device("cuda", torch.cuda.current_device())
    with torch.cuda.graph(graph):
        written = step()

    def replay() -> torch.Tensor:
        with _on(device):
            graph.replay()
        return written

    return replay


def state(device: torch.device) -> dict[str, float | str] | None:
    """Clocks, temperature, power and reasons for throttling (a bit mask, as NVML names them) at
    this moment; None where the driver's nvidia-smi does not tell."""
    properties = torch.cuda.get_device_properties(device)
    command = ["nvidia-smi", f"--id=GPU-{properties.uuid}", "--format=csv,noheader,nounits",
               f"--query-gpu={','.join(_STATE.values())}"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    [row] = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    found: dict[str, float | str] = {}
    for name, text in zip(_STATE, row, strict=True):
        try:
            found[name] = float(text)
        except ValueError:  # a mask, or "[N/A]"
            found[name] = text
    return found
