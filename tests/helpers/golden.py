"""Outputs of the published implementation of every method.

The files in tests/golden come from the reference repositories, one thread on a CPU; the JSON beside
each names the repository, its commit and the meaning of every tensor. Tolerances are the files'.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from elastic.adapters import METHODS
from elastic.config import AdapterConfig

GOLDEN = Path(__file__).parents[1] / "golden"


class Case:
    """A golden file; `same` compares whole tensors at its tolerance."""

    def __init__(self, name: str) -> None:
        self.about = json.loads((GOLDEN / f"{name}.json").read_text())
        self.config = self.about["config"]
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")
        self.scalars = {key: item["value"] for key, item in self.about["scalars"].items()}
        tolerance = self.about["tolerance"]
        self.tolerance = {"rtol": tolerance["rtol"], "atol": tolerance["atol"]}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def same(self, found: torch.Tensor, name: str) -> None:
        expected = self[name]
        torch.testing.assert_close(found.reshape(expected.shape), expected, **self.tolerance)


def names(prefix: str, needed: str) -> list[str]:
    """Cases of a method that hold a certain tensor."""
    files = sorted(GOLDEN.glob(f"{prefix}_*.json"))
    return [f.stem for f in files if needed in json.loads(f.read_text())["tensors"]]


def adapter_of(config: AdapterConfig, weight: torch.Tensor, dtype=torch.float64):
    adapter = METHODS[config.method](config, *weight.shape, dtype=dtype)
    adapter.start(weight, torch.Generator().manual_seed(0))
    return adapter


def load_(adapter, case: Case, prefix: str = "", **renamed: str) -> None:
    for name, parameter in adapter.named_parameters():
        parameter.data.copy_(case[prefix + renamed.get(name, name)])


def forward(adapter, x: torch.Tensor, weight: torch.Tensor, bias=None, rank=None) -> torch.Tensor:
    A, B = adapter.factors(rank or adapter.max_rank)
    return nn.functional.linear(x, weight, bias) + x @ A.T @ B.T


def delta(adapter, rank: int | None = None) -> torch.Tensor:
    A, B = adapter.factors(rank or adapter.max_rank)
    return (B @ A).detach()


def trained_numbers(adapter) -> int:
    return sum(p.numel() for p in adapter.parameters() if p.requires_grad)


def task_gradients(adapter, case: Case) -> dict[str, torch.Tensor]:
    """Outputs and merge are checked on the way: they hold in every case alike."""
    bias = case.tensors.get("bias")
    y = forward(adapter, case["x"], case["W0"], bias)
    case.same(y, "y")
    case.same(case["W0"] + delta(adapter), "W_merged")
    case.same(delta(adapter), "delta_W")
    adapter.zero_grad()
    (y * case["grad_y"]).sum().backward()
    return {name: p.grad.clone() for name, p in adapter.named_parameters()}
