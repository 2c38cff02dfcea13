"""What gradient checkpointing and torch.compile do to a training step.

    python -m tests.benchmarks.options [--save]

Both on the same supernet, interleaved with the plain step. For torch.compile also the seconds of
each step in which a sub-adapter is new to it, and the graphs it has compiled.
"""

from __future__ import annotations

import statistics
import time

import torch

from elastic.models.meter import Meter
from tests.benchmarks.common import llama, report, sides
from tests.benchmarks.step import Steps

LAYERS, HIDDEN = 4, 512


def checkpointing() -> dict[str, dict[str, float]]:
    plain, saving = Steps(llama(LAYERS, hidden=HIDDEN)), Steps(llama(LAYERS, hidden=HIDDEN))
    saving.net.model.gradient_checkpointing_enable({"use_reentrant": False})
    steps = {
        name: lambda one=one: one.elastic(one.net.space.maximal())
        for name, one in {"plain": plain, "again (control)": plain, "checkpointed": saving}.items()
    }
    found = sides(steps, 10, baseline="plain")
    saved = {}
    for name, one in {"plain": plain, "checkpointed": saving}.items():
        given = (*one.net.model.parameters(), *one.net.model.buffers(), *one.batch.values())
        with Meter(given).recording() as meter:
            steps[name]()
        saved[name] = meter.peak
    for name, row in found.items():
        row["peak_memory"] = saved.get(name, saved["plain"]) / saved["plain"]
    return found


def compiled() -> dict[str, dict[str, float]]:
    """Eager and compiled, each with a sub-adapter of its own in every step as training has it."""
    steps = Steps(llama(LAYERS, hidden=HIDDEN))
    net, eager = steps.net, steps.net.model
    fast = torch.compile(eager)
    steps.optimizers[id(fast)] = steps.optimizers[id(eager)]
    fast.get_output_embeddings = eager.get_output_embeddings

    def step(model, sub) -> float:
        start = time.perf_counter()
        with net.active(sub):
            steps.step(model)
        return time.perf_counter() - start

    rows = {}
    for name, model in {"eager": eager, "compiled": fast}.items():
        first = [step(model, sub) for sub in steps.draws]
        rows[f"{name}, a new sub-adapter"] = {"median_ms": 1e3 * statistics.median(first)}
        fixed = [step(model, steps.draws[-1]) for _ in range(10)]
        rows[f"{name}, the same again"] = {"median_ms": 1e3 * statistics.median(fixed[2:])}
    stats = torch._dynamo.utils.counters["stats"]
    rows["compiled, a new sub-adapter"]["graphs"] = stats["unique_graphs"]
    return rows


def main() -> None:
    rows = checkpointing() | compiled()
    report("options", f"training step, random Llama, {LAYERS} layers of {HIDDEN}, float32", rows)


if __name__ == "__main__":
    main()
