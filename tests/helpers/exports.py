"""Exports of tiny runs, and what is asked of them."""

from __future__ import annotations

import contextlib
import resource
import signal

import torch

from elastic.config import CompensationConfig, ExportConfig
from elastic.files import write_json
from elastic.run import Run
from elastic.spaces.bound import SubAdapter
from tests.helpers import tiny
from tests.helpers.tiny_runs import ONE_ROUND

# Of the largest logit. float32: sums in another order, over two layers; float64: the same.
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


def config(run: Run, **overrides) -> ExportConfig:
    """What is cut is not made up for, so that a name alone says what is written."""
    nothing = CompensationConfig(degrees=[0.0])
    settings = dict(formats=["hf"], accuracy=False, timing=ONE_ROUND, compensation=nothing)
    return ExportConfig(run=str(run.path), **(settings | overrides))


def logits_close(found: torch.Tensor, expected: torch.Tensor, dtype: str = "float32") -> None:
    atol = TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def active_logits(net, sub, ids) -> torch.Tensor:
    with net.active(sub) as model:
        return tiny.logits(model, ids)


def mixed_ranks(net) -> SubAdapter:
    """Full size but for ranks, which differ from layer to layer."""
    indices = {g.name: i % len(g.choices) if g.dim == "rank" else 0
               for i, g in enumerate(net.space)}  # fmt: skip
    return net.space.at(indices)


def write_sub(sub: SubAdapter, file) -> str:
    write_json(file, sub.as_dict())
    return str(file)


def hidden(folder) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


@contextlib.contextmanager
def small_files(most: int = 60_000):
    """No file may grow beyond this: a real failure of whatever writes."""
    signals = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, signals)
