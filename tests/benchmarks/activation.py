"""Activating a random sub-adapter in a supernet of 96 groups (32 layers, the LoNAS space).

python -m tests.benchmarks.activation [--save]
"""

from __future__ import annotations

import itertools

from elastic.config import AdapterConfig
from elastic.sampler import generator_for
from elastic.space import SearchSpace
from elastic.supernet import Supernet
from tests.benchmarks.common import interleaved, llama, report, summary


def main() -> None:
    model = llama(32, hidden=64, intermediate=1536, vocabulary=64)
    net = Supernet(model, SearchSpace.load("llama"), AdapterConfig(rank=32))
    generator = generator_for(0, "benchmark")
    subs = itertools.cycle([net.space.random(generator) for _ in range(64)])
    seconds = interleaved(
        {"random to random": lambda: net.activate(next(subs)),
         "again (control)": lambda: net.activate(next(subs))},
        200,
    )  # fmt: skip
    rows = {row: summary(found) for row, found in seconds.items()}
    report(
        "activation", f"activation on {len(net.space.groups)} groups", rows,
        groups=len(net.space.groups),
    )  # fmt: skip


if __name__ == "__main__":
    main()
