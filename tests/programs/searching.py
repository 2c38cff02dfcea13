"""Searches one study from several processes, the first of which is killed in mid-trial.

    python tests/programs/searching.py RUN STORAGE WORKERS TRIALS

One interpreter imports everything once and forks. Latency is a function of the size. Every call
of the objective leaves a line (process, sub-adapter) in RUN/asked.jsonl; the last line printed is
what the processes ended with.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from elastic.config import CompensationConfig, SearchConfig, StudyConfig
from elastic.latency import bench
from elastic.searching import front
from elastic.searching.objective import Objective
from elastic.searching.study import search
from tests.helpers.children import ended, forked
from tests.helpers.tiny_runs import ONE_ROUND, fake_measure

KILLED_AT = 3


def work(config: SearchConfig, *, doomed: bool) -> None:
    torch.set_num_threads(1)
    calls, call = [], Objective.__call__

    def told(self, sub, *rivals):
        calls.append(sub)
        line = json.dumps([os.getpid(), sub.as_dict()]) + "\n"
        with open(Path(config.run) / "asked.jsonl", "a") as file:
            file.write(line)
        if doomed and len(calls) == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)  # or the first process would be done before the last one begins
        return call(self, sub, *rivals)

    bench.measure = fake_measure
    front.draw = lambda front, path: None  # every worker would draw what nobody looks at
    Objective.__call__ = told
    search(config)


def together(config: SearchConfig, workers: int) -> list[int]:
    """Exit codes of so many processes at one search, which begin as this one is."""
    tasks = [functools.partial(work, config, doomed=number == 0) for number in range(workers)]
    return [ended(child) for child in [forked(task) for task in tasks]]


def config_of(run: Path | str, storage: str, trials: int) -> SearchConfig:
    study = StudyConfig(storage=storage or None, name="shared")
    nothing = CompensationConfig(degrees=[0.0])
    return SearchConfig(
        run=str(run), study=study, trials=trials, starts=6, timing=ONE_ROUND, test_front=2,
        compensation=nothing,
    )  # fmt: skip


if __name__ == "__main__":
    run, storage, workers, trials = sys.argv[1:]
    config = config_of(run, storage, int(trials))
    print(json.dumps(together(config, int(workers))))
