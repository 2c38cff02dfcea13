"""A server that takes a smaller size while requests wait, beside fixed sizes.

    python -m tests.benchmarks.serving RUN [--requests 120] [--save]

RUN is searched and exported with `--formats elastic`. Requests are its test prompts, which arrive
in turns at six tenths of what the full model can answer and at half as much again as it can. They
are answered one after another in the order in which they came, on the clock of this machine. One
server has the full size, one the smallest of the front, and one looks at its queue before every
request:

    with model.at(size_for(len(waiting))):
        answer = model.generate(...)

The full one is measured twice (A/A control). Latency is from arrival to answer.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import elastic
from elastic.data.encoding import ends_of, prompt_ids
from elastic.data.task import Example
from elastic.evaluation.statistics import Score
from elastic.formats import slices
from elastic.models import loading
from elastic.run import Run
from elastic.supernet.examples import task_of
from tests.benchmarks.common import report

NEW_TOKENS = 6
CALM, BUSY, PHASE = 0.6, 1.5, 20
"""Requests per answer of the full model, and how many come at one pace."""
LONG = 2
"""Requests that wait when the smallest size is taken; one alone makes it the best one's turn."""


def arrivals(number: int, service: float) -> list[float]:
    """Seconds at which requests come, at random at each pace (a Poisson process)."""
    generator, now, found = random.Random(0), 0.0, []
    for n in range(number):
        pace = (CALM, BUSY)[n // PHASE % 2]
        now += generator.expovariate(pace / service)
        found.append(now)
    return found


class Server:
    """One model, which answers prompts at whatever size it has."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.model: Any = elastic.load(folder, resizable=True, slice="full")
        self.tokenizer = loading.load_tokenizer(run.config().model)

    @torch.inference_mode()
    def answer(self, example: Example) -> str:
        ids = torch.tensor([prompt_ids(self.tokenizer, example, self.model)])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
            eos_token_id=sorted(ends_of(self.tokenizer, example, self.model)),
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()

    def serve(
        self, examples: Sequence[Example], times: Sequence[float], size_for: Callable[[int], str]
    ) -> dict[str, Any]:
        """All requests, each when it has come and those before it are answered."""
        latencies, right, sizes = [], [], []
        start = time.perf_counter()
        for number, (example, arrival) in enumerate(zip(examples, times, strict=True)):
            now = time.perf_counter() - start
            if now < arrival:
                time.sleep(arrival - now)
            now = time.perf_counter() - start
            waiting = sum(later <= now for later in times[number + 1 :])
            sizes.append(size_for(waiting))
            with self.model.at(sizes[-1]):
                right.append(self.answer(example) == example.answer)
            latencies.append(time.perf_counter() - start - arrival)
        score = Score(tuple(right))
        low, high = score.interval
        return {
            "median_ms": 1e3 * statistics.median(latencies),
            "p95_ms": 1e3 * statistics.quantiles(latencies, n=20)[-1],
            "accuracy": score.accuracy, "low": low, "high": high, "n": score.n,
            "at full size": sizes.count("full") / len(sizes),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", default="best")
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    run = Run(given.run)
    folder = run.exports / given.name / "elastic"
    front = [name for name in slices.read(folder)["slices"] if name.startswith("front-")]
    best = next(n for n in front if slices.read(folder)["slices"][n].get("best"))
    server, examples = Server(run, folder), list(task_of(run).test[: given.requests])

    def by_queue(waiting: int) -> str:
        return "full" if not waiting else best if waiting < LONG else front[0]

    for example in examples[:3]:
        server.answer(example)
    took = []
    for example in examples[:10]:
        start = time.perf_counter()
        server.answer(example)
        took.append(time.perf_counter() - start)
    times = arrivals(len(examples), statistics.median(took))
    switches = []
    for _ in range(50):
        for name in (front[0], "full"):
            start = time.perf_counter()
            server.model.resize(name)
            switches.append(time.perf_counter() - start)
    ways: dict[str, Callable[[int], str]] = {
        "full": lambda _: "full", "smallest": lambda _: front[0], "by the queue": by_queue,
        "full again (control)": lambda _: "full",
    }  # fmt: skip
    rows = {name: server.serve(examples, times, size_for) for name, size_for in ways.items()}
    report(
        "serving",
        f"requests from arrival to answer, {len(examples)} of {run.path.name}'s test prompts, the "
        f"full model takes {1e3 * statistics.median(took):.0f} ms for one; changing the size takes "
        f"{1e3 * statistics.median(switches):.2f} ms",
        rows, save=given.save, command="python -m tests.benchmarks.serving RUN",
        resize_ms=1e3 * statistics.median(switches),
    )  # fmt: skip


if __name__ == "__main__":
    main()
