"""Activating a random sub-adapter: 96 groups (32 layers, the LoNAS space) and 1,002 (334 layers).

python -m tests.benchmarks.activation [--save]
"""

from __future__ import annotations

import itertools

from elastic.config import AdapterConfig
from elastic.spaces.bound import generator_for
from elastic.spaces.declared import SearchSpace
from elastic.supernet.supernet import Supernet
from tests.benchmarks.common import interleaved, llama, report, summary


def times(layers: int) -> tuple[int, dict[str, dict[str, float]]]:
    """Groups, and the milliseconds of going from one random sub-adapter to another."""
    model = llama(layers, hidden=64, intermediate=512, vocabulary=64)
    net = Supernet(model, SearchSpace.load("llama"), AdapterConfig(rank=32))
    generator = generator_for(0, "benchmark")
    subs = itertools.cycle([net.space.random(generator) for _ in range(64)])
    seconds = interleaved(
        {"random to random": lambda: net.activate(next(subs)),
         "again (control)": lambda: net.activate(next(subs))},
        200,
    )  # fmt: skip
    return len(net.space.groups), {row: summary(found) for row, found in seconds.items()}


def main() -> None:
    rows = {}
    for layers in (32, 334):
        groups, found = times(layers)
        rows |= {f"{groups} groups, {row}": value for row, value in found.items()}
    report("activation", "activation of a sub-adapter", rows)


if __name__ == "__main__":
    main()
