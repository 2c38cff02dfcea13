"""Run directories small enough to train in a second."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from elastic.config import (
    AdapterConfig,
    ModelConfig,
    StageConfig,
    TaskConfig,
    TimingConfig,
    TrainConfig,
)
from elastic.latency.measure import Bounds, Latency, Measurement
from elastic.run import Run
from elastic.supernet.cost import count
from elastic.training.one_task import train_one
from elastic.training.trainer import ElasticTrainer
from tests.helpers.tiny import ALPHA, RANK, space_dict

ONE_ROUND = TimingConfig(prompt_tokens=4, new_tokens=1, rounds=1, max_rounds=1)


def space_file(folder: Path, declared: Mapping | None = None) -> str:
    """The tiny space as a YAML file, with heads unless another is given."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tiny-space.yaml"
    file.write_text(yaml.safe_dump(space_dict(heads=True) if declared is None else declared))
    return str(file)


def train_config(base: Path, run: Path, **overrides) -> TrainConfig:
    """Eight steps on 32 problems: an epoch at full size, an epoch of everything."""
    settings = dict(
        run=str(run),
        model=ModelConfig(path=str(base), dtype="float32", device="cpu"),
        adapter=AdapterConfig(rank=RANK, alpha=ALPHA),
        task=TaskConfig(train_examples=32, validation_examples=8, test_examples=8),
        stages=[StageConfig(), StageConfig(train_dims=["rank", "width", "heads"])],
        batch_size=8,
        save_steps=2,
    )
    settings |= overrides
    if "space" not in settings:
        settings["space"] = space_file(run.parent)
    return TrainConfig(**settings)


def factors(run: Run) -> dict[str, torch.Tensor]:
    """What a finished run has trained."""
    return load_file(run.super_adapter / "factors.safetensors")


def metrics(run: Run) -> list[dict]:
    """What a run has logged."""
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def assert_same_factors(one: Run, other: Run) -> None:
    assert factors(one).keys() == factors(other).keys()
    for name, tensor in factors(one).items():
        assert torch.equal(tensor, factors(other)[name]), name


def interrupted(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, step: int) -> Run:
    """Training of `config`, stopped in the forward pass of a 0-based step."""
    training_step = ElasticTrainer.training_step

    def stopped(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ElasticTrainer, "training_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_one(config)
    return Run(config.run)


def randomize_factors(run: Run, seed: int = 0) -> None:
    """Replace the trained factors on disk: a short training leaves B near zero, where a forgotten
    update would hardly show."""
    file = run.super_adapter / "factors.safetensors"
    generator = torch.Generator().manual_seed(seed)
    state = load_file(file)
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        state[name] = (0.1 * noise).to(tensor.dtype)
    save_file(state, file)


def move_factors(run: Run, seed: int = 0) -> None:
    """Add noise to every trained tensor on disk, for methods whose factors have a shape to keep."""
    file = run.super_adapter / "factors.safetensors"
    generator = torch.Generator().manual_seed(seed)
    state = load_file(file)
    for name, tensor in state.items():
        if name.rpartition(".")[2] not in ("temperature", "A0", "B0", "S0"):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            state[name] = tensor + (0.1 * noise).to(tensor.dtype)
    save_file(state, file)


def copy_run(run: Run, path: Path) -> Run:
    shutil.copytree(run.path, path)
    return Run(path)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder`, hidden ones too, with the bytes of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def prefill_of(params: int) -> float:
    return params / 1000


def decode_of(params: int) -> float:
    return 2 + params / 10000


def fake_measure(runners, config, *, vocabulary, seed=0, clock=None):
    sizes = {name: count(runner.model).params for name, runner in runners.items()}
    found = {n: Latency(prefill_of(size), decode_of(size), 0.0) for n, size in sizes.items()}
    return measurement(found, config)


def measurement(latencies: Mapping[str, Latency], config: TimingConfig) -> Measurement:
    """Of a machine whose full model never differs from itself."""
    full = latencies["full"]
    ratios = {
        name: Latency(own.prefill_ms / full.prefill_ms, own.decode_ms / full.decode_ms, own.spread)
        for name, own in latencies.items()
    }
    bounds = {name: Bounds((r.prefill_ms,) * 2, (r.decode_ms,) * 2) for name, r in ratios.items()}
    return Measurement(latencies, 0.0, config.rounds, config.tolerance, ratios, bounds)


RATES = ("examples_per_second", "tokens_per_second")


def logged(run: Run) -> list[dict]:
    """All that was logged but the pace, which is no function of the settings."""
    rows = metrics(run)
    assert all(rate in row for row in rows for rate in RATES)
    return [{key: value for key, value in row.items() if key not in RATES} for row in rows]
