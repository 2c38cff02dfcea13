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

from elastic.config import SearchConfig, StudyConfig
from elastic.latency import bench
from elastic.searching.front import Front
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
    Front._plot = lambda self, path: None  # every worker would draw what nobody looks at
    Objective.__call__ = told
    search(config)


if __name__ == "__main__":
    run, storage, workers, trials = sys.argv[1:]
    config = SearchConfig(
        run=run, study=StudyConfig(storage=storage or None, name="shared"), trials=int(trials),
        starts=6, timing=ONE_ROUND, test_front=2,
    )  # fmt: skip
    children = [
        forked(functools.partial(work, config, doomed=number == 0))
        for number in range(int(workers))
    ]
    print(json.dumps([ended(child) for child in children]))
