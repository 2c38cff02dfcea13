"""Trains tiny runs as one of several processes.

    torchrun --nproc_per_node 2 tests/programs/several.py TINY_MODEL FOLDER NAME ...

The tests fork instead, which spares importing everything in every process. NAME is a key of RUNS;
`resumed` is stopped after a checkpoint and begun again. What FSDP2 computes is written to
FOLDER/sharded.safetensors.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from pytest import MonkeyPatch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from elastic.config import SequenceConfig, StageConfig, TaskConfig
from elastic.spaces.dims import DEPTH, DIMS
from elastic.supernet.supernet import Supernet
from elastic.training import one_task
from elastic.training.command import train
from tests.helpers import tiny
from tests.helpers.children import all_ended, forked
from tests.helpers.once import fitting_once
from tests.helpers.steps import step_gradients
from tests.helpers.tiny_runs import interrupted, space_file, train_config

OPEN = StageConfig(train_dims=["rank", "width", "heads"])
RUNS = {
    "staged": {},
    "resumed": {},
    "accumulated": {"accumulation": 2, "batch_size": 2},
    "sandwich": {"sampling": "sandwich", "distill": 0.5, "stages": [OPEN]},
    "own": {"sample_each": "process", "stages": [OPEN]},
    "deep": {"sample_each": "process", "stages": [StageConfig(train_dims=[*DIMS, DEPTH])]},
    "sequence": {"tasks": ["sums", "words"], "stages": [StageConfig(), OPEN]},
}
REGULARISED = ("sorsa", "olora", "soslora")
"""Methods whose gradients after one step go to FOLDER/METHOD-RANK.safetensors, by process; with the
regulariser in the loss to FOLDER/METHOD-in-loss-RANK.safetensors."""
ALONE = {
    "accumulated": {"accumulation": 2, "batch_size": 4},
    "own": {"sample_each": "micro_batch", "accumulation": 2, "batch_size": 4},
    "deep": {"sample_each": "micro_batch", "accumulation": 2, "batch_size": 4},
}
"""What one process does instead, where it is more than twice the batch."""


def write_tasks(folder: Path) -> None:
    """What `sequence` trains on."""
    for name, first in (("sums", 1), ("words", 50)):
        for split, at in (("train", first), ("test", first + 25)):
            rows = [{"prompt": f"{name} {n} ->", "answer": str(n % 3)} for n in range(at, at + 20)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.{split}.jsonl").write_text(lines)


def config_of(model: Path, folder: Path, name: str, *, alone: bool):
    settings = {"batch_size": 8 if alone else 4, "probe_steps": 2, **RUNS[name]}
    if "tasks" in settings:
        files = {split: str(folder / f"{{task}}.{split}.jsonl") for split in ("train", "test")}
        sizes = {"validation_examples": 4, "test_examples": 16}
        settings["task"] = TaskConfig(name="jsonl", **sizes, **files)
        settings["sequence"] = SequenceConfig(new_tokens=3)
    if name == "deep":  # a process may have no gradient of a block that another trains
        declared = tiny.space_dict()
        declared["groups"]["depth"] = {"dim": "depth", "choices": [2, 1], "drop_ends": True}
        settings["space"] = space_file(folder / "deep-space", declared)
    if alone:
        settings |= ALONE.get(name, {})
    return train_config(model, folder / name, **settings)


def gradients(net: Supernet, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a loss on `ids`, by sub-adapter and parameter; gathered where they are sharded."""
    found = {}
    for number, sub in enumerate((net.space.maximal(), net.space.heuristic(), net.space.minimal())):
        net.model.zero_grad()
        with net.active(sub):
            net.model(input_ids=ids).logits.log_softmax(-1)[..., 0].mean().backward()
        for name, parameter in net.model.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad
                if isinstance(gradient, DTensor):
                    gradient = gradient.full_tensor()
                found[f"{number} {name}"] = gradient.clone()
    return found


def shard(folder: Path) -> None:
    """FSDP2 on CPU processes, which accelerate does not offer."""
    net = tiny.supernet(heads=True)
    mesh = init_device_mesh("cpu", (2,))
    for layer in net.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net.model, mesh=mesh)
    half = tiny.tokens(batch=4).chunk(2)[mesh.get_rank()]
    found = gradients(net, half)
    assert all(isinstance(p, DTensor) for p in net.model.parameters())
    if mesh.get_rank() == 0:
        save_file(found, folder / "sharded.safetensors")


def work(model: Path, folder: Path, *names: str) -> None:
    """What one of the processes does."""
    fitting_once(MonkeyPatch(), one_task)
    for name in names:
        config = config_of(model, folder, name, alone=False)
        if name == "resumed":
            with MonkeyPatch.context() as patch:  # every process, after the checkpoint of step 4
                stopped = interrupted(config, patch, 5)
            assert not stopped.super_adapter.exists()
        train(config)
    rank = int(os.environ["RANK"])
    for method in REGULARISED:
        own = folder / f"process-{rank}"
        for place, in_loss in ((method, False), (f"{method}-in-loss", True)):
            _, seen = step_gradients(
                model, own / place, method, batch_size=8, accumulation=1, in_loss=in_loss
            )
            save_file(seen, folder / f"{place}-{rank}.safetensors")
    shard(folder)


def as_torchrun(rank: int, port: int, act: Callable[[], None]) -> None:
    """In a forked process: `act` as one of two that torchrun has started."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    for state in (AcceleratorState, GradientState):  # of the process before it was forked
        state._reset_state()
    PartialState._reset_state()
    act()


def together(model: Path, folder: Path, *names: str) -> list[int]:
    """Exit codes of two processes at `work`, forked from this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    act = functools.partial(work, model, folder, *names)
    return all_ended([forked(functools.partial(as_torchrun, n, port, act)) for n in range(2)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
