"""Trains tiny runs in child processes that are killed with SIGKILL at random moments.

    python tests/programs/killed.py TINY_MODEL FOLDER SEED KILLS

One interpreter imports everything once and forks; FOLDER/whole is never interrupted,
FOLDER/killed is killed and begun again until it ends by itself. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from elastic.config import AdapterConfig, StageConfig
from elastic.run import Run
from elastic.training import checkpoints, one_task
from elastic.training.one_task import train_one
from tests.helpers.tiny_runs import train_config

DIMS = ["rank", "width", "heads"]


def begin(config) -> int:
    child = os.fork()
    if child == 0:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        code = 1
        try:
            train_one(config)
            code = 0
        finally:
            os._exit(code)
    return child


def steps(run: Run) -> int:
    return run.metrics.read_bytes().count(b"\n") if run.metrics.is_file() else 0


def killed(config, generator: random.Random, moment: str) -> dict[str, int | str]:
    """Start the run and kill it a little after a step, or while a checkpoint is being written."""
    run = Run(config.run)
    child = begin(config)
    goal = steps(run) + generator.randint(1, 2)

    def half() -> bool:
        """Whether a checkpoint is being written: it has no mark yet."""
        folders = run.checkpoints.glob("checkpoint-*")
        return any(not (folder / checkpoints.DIGESTS).is_file() for folder in folders)

    def reached() -> bool:
        return steps(run) >= goal and (moment == "step" or half())

    while not reached() and os.waitpid(child, os.WNOHANG) == (0, 0):
        # A checkpoint is written in a few milliseconds.
        time.sleep(0.001 if steps(run) >= goal else 0.02)
    time.sleep(generator.uniform(0, 0.02 if moment == "step" else 0.005))
    seen = {"moment": moment, "half": half()}
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        seen["ended"] = True
    return {**seen, "steps": steps(run)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_task.require_fits = lambda *_: None  # half of what each child takes to begin
    model, folder, seed, kills = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5])
    settings = dict(save_steps=1, adapter=AdapterConfig(rank=8, dropout=0.2), accumulation=2,
                    batch_size=4, seed=seed,
                    stages=[StageConfig(), StageConfig(train_dims=DIMS, epochs=3)])  # fmt: skip
    config = train_config(model, folder / "killed", **settings)
    generator = random.Random(seed)
    found = [killed(config, generator, ("step", "write")[n % 2]) for n in range(kills)]
    codes = []
    for one in (config, train_config(model, folder / "whole", **settings)):
        _, status = os.waitpid(begin(one), 0)
        codes.append(os.waitstatus_to_exitcode(status))
    print(json.dumps({"kills": found, "codes": codes}))
