"""Timing on a GPU, as far as a machine without one can tell; the rest needs one."""

import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from elastic.config import TimingConfig
from elastic.formats.runner import TorchRunner
from elastic.latency import cuda
from elastic.latency.cuda import CudaClock, GraphRunner, state
from elastic.latency.measure import clock_of, measure, state_of
from elastic.latency.runtime import timed_runner
from tests.helpers import tiny
from tests.helpers.clock import drive
from tests.helpers.families import model_of


def written_once(step):
    """What a graph does, without one: later steps write into the tensor of the first."""
    held = step().clone()

    def replay():
        held.copy_(step())
        return held

    return replay


def agrees(model, capture=None) -> None:
    """With TorchRunner, whose cache grows; after a longer text and after a shorter one too."""
    runner, plain = GraphRunner(model, 2, 12, capture), TorchRunner(model)
    close = dict(rtol=1e-4, atol=1e-4) if model.device.type == "cuda" else dict(atol=1e-5)
    for seed, (length, prompt) in enumerate([(9, 5), (12, 1), (6, 4)]):
        ids = tiny.tokens(2, length, seed=seed).numpy()
        found, expected = drive(runner, ids, prompt), drive(plain, ids, prompt)
        np.testing.assert_allclose(found, expected, **close)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "gpt-neox", "phi3"])
def test_a_cache_of_fixed_size_gives_the_same_logits(family):
    agrees(model_of(family), written_once)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_nothing_of_the_cache_counts_in_python(family):
    """A graph would go on with the number that was there when it was captured."""
    runner = GraphRunner(model_of(family), 2, 12, written_once)
    assert all(torch.is_tensor(layer.cumulative_length) for layer in runner._cache.layers)
    assert not any(layer.is_sliding for layer in runner._cache.layers)


def test_code_that_cannot_be_captured_decodes_without_a_graph(monkeypatch, capsys):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda, "GraphRunner", refuse)
    model = tiny.llama()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert type(timed_runner(model, TimingConfig())) is TorchRunner
    assert "without a CUDA graph" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "phi3"])
def test_a_graph_gives_the_same_logits(family):
    agrees(model_of(family, torch.float32).to("cuda"))


@pytest.mark.gpu
def test_a_gpu_is_timed_and_tells_its_clocks():
    model = tiny.llama(dtype=torch.float32).to("cuda")
    config = TimingConfig(prompt_tokens=8, new_tokens=4)
    runners = {"full": timed_runner(model, config), "same": timed_runner(model, config)}
    assert isinstance(runners["full"], GraphRunner)
    found = measure(runners, config, vocabulary=32, clock=clock_of(model.device))
    assert found.full.decode_ms > 0 and found.full.prefill_ms > found.full.decode_ms
    assert state_of(model.device)["sm_mhz"] > 0


def test_a_cpu_is_timed_by_the_wall_clock():
    model = tiny.llama()
    assert type(timed_runner(model, TimingConfig())) is TorchRunner
    first, second = (clock_of(model.device)() for _ in range(2))
    assert second >= first
    assert state_of(model.device) is None


class Event:
    """As torch.cuda.Event, recorded at the times listed (milliseconds)."""

    times = iter(())

    def __init__(self, enable_timing):
        assert enable_timing
        self.waited = False

    def record(self):
        self.at = next(Event.times)

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, end):
        assert self.waited and end.waited
        return float(np.float32(end.at - self.at))


def test_the_clock_counts_from_event_to_event(monkeypatch):
    """Seconds; an hour later a microsecond still shows, though an event counts in float32."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    hour = 3.6e6
    Event.times = iter([5.0, 7.5, hour, hour + 0.001])
    clock = CudaClock()
    assert clock() == pytest.approx(2.5e-3)
    before = clock()
    assert before == pytest.approx(hour / 1e3, abs=0.01)
    assert clock() - before == pytest.approx(1e-6, rel=1e-3)


def test_clocks_are_what_the_driver_says(monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        return SimpleNamespace(stdout="1980, 1980, 2619, 41, [N/A], 0x0000000000000001\n")

    monkeypatch.setattr(cuda.subprocess, "run", run)
    properties = SimpleNamespace(uuid="12-34")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert state(torch.device("cuda")) == {
        "sm_mhz": 1980, "sm_max_mhz": 1980, "memory_mhz": 2619, "temperature_c": 41,
        "power_w": "[N/A]", "throttle_reasons": "0x0000000000000001",
    }  # fmt: skip
    assert "--id=GPU-12-34" in asked[0]


@pytest.mark.parametrize(
    "fault", [FileNotFoundError("nvidia-smi"), subprocess.CalledProcessError(6, "nvidia-smi")]
)
def test_a_driver_that_says_nothing_is_no_obstacle(monkeypatch, fault):
    def run(*_, **__):
        raise fault

    monkeypatch.setattr(cuda.subprocess, "run", run)
    properties = SimpleNamespace(uuid="12-34")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert state(torch.device("cuda")) is None
