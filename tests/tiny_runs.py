"""Run directories small enough to train in a second."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

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
from elastic.run import Run
from tests.tiny import ALPHA, RANK, space_dict

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
