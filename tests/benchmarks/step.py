"""One elastic training step against one plain PEFT LoRA step: same model, targets, rank, batch.

    python -m tests.benchmarks.step [--save]

A step is forward, loss on the answer positions, backward and AdamW; the PEFT model is measured
twice (A/A control), the candidates take turns. Beside each measured ratio stands the ratio of
operations, counted while the steps run, and of peak memory. On CUDA: bfloat16, 8 x 512 tokens, and
beside each the same step replayed from a CUDA graph, which does not wait for Python to launch it.
`--parts` measures some models and keeps the rest of an earlier result.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile

from elastic.config import AdapterConfig, ModelConfig
from elastic.data.answers import answer_logits, answer_loss
from elastic.data.collating import IGNORED
from elastic.models import loading
from elastic.models.meter import Meter
from elastic.spaces.bound import SubAdapter, generator_for
from elastic.spaces.declared import SearchSpace
from elastic.supernet.supernet import Supernet
from tests.benchmarks.common import RESULTS, TARGETS, llama, report, sides
from tests.helpers.laws import some_moments

RANK, ALPHA, ANSWER, DRAWS = 32, 64, 4, 6
MADE_UP = "elastic, draws made up for"
"""compensation_in_training: solutions are found once, folded into the weights in every step. Its
operations are those of the draws alone, so that the fold counts as overhead."""
GRAPH = ", from a graph"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
BATCH, LENGTH = (8, 512) if CUDA else (8, 32)


class Steps:
    """A plain PEFT model and a supernet on the same base weights, and one step of either."""

    def __init__(self, model: torch.nn.Module, space: str = "llama") -> None:
        model = model.to(DEVICE, DTYPE)
        self.plain = get_peft_model(
            copy.deepcopy(model), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
        ).train()
        declared = SearchSpace.load(space)
        self.net = Supernet(model, declared, AdapterConfig(rank=RANK, alpha=ALPHA))
        self.net.model.train()
        self.net.compensation = some_moments(self.net)
        generator = generator_for(0, "benchmark")
        self.draws = [self.net.space.random(generator) for _ in range(DRAWS)]
        self.batch = batch_of(model.config.vocab_size)
        self.optimizers = {
            id(m): torch.optim.AdamW(
                [p for p in m.parameters() if p.requires_grad], lr=1e-4, capturable=CUDA
            )
            for m in (self.plain, self.net.model)
        }

    def step(self, model: torch.nn.Module) -> None:
        self.launch(model)
        if CUDA:
            torch.cuda.synchronize()

    def launch(self, model: torch.nn.Module) -> None:
        logits, labels = answer_logits(model, self.batch, ANSWER)
        (answer_loss(logits, labels) / labels.numel()).backward()
        self.optimizers[id(model)].step()
        self.optimizers[id(model)].zero_grad()

    def captured(self, model: torch.nn.Module) -> Callable[[], None]:
        """The step of a model as it is now, replayed from a CUDA graph."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.launch(model)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.launch(model)

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return replay

    def peft(self) -> None:
        self.step(self.plain)

    def elastic(self, sub: SubAdapter, degree: float = 0.0) -> None:
        with self.net.active(sub, degree):
            self.step(self.net.model)

    def candidates(self) -> dict[str, Callable[[], None]]:
        for sub in self.draws:  # a run solves for all choices in its first steps
            self.net.activate(sub, 1.0)
        draws, again = itertools.cycle(self.draws), itertools.cycle(self.draws)
        return {
            **(self.graphs() if CUDA else {}),
            "peft": self.peft,
            "peft again (control)": self.peft,
            "elastic, maximal": lambda: self.elastic(self.net.space.maximal()),
            "elastic, uniform draws": lambda: self.elastic(next(draws)),
            MADE_UP: lambda: self.elastic(next(again), 1.0),
            "elastic, minimal": lambda: self.elastic(self.net.space.minimal()),
        }

    def graphs(self) -> dict[str, Callable[[], None]]:
        found = {f"peft{GRAPH}": self.captured(self.plain)}
        space = self.net.space
        for name, sub in (("maximal", space.maximal()), ("minimal", space.minimal())):
            with self.net.active(sub):
                found[f"elastic, {name}{GRAPH}"] = self.captured(self.net.model)
        return found

    def metered(self) -> dict[str, Meter]:
        """Operations and peak memory of a step; of the draws, of the first and largest one."""
        space = self.net.space
        largest = max(self.draws, key=lambda sub: sum(choice for _, choice in sub.choices))
        steps = {
            "peft": self.peft,
            "elastic, maximal": lambda: self.elastic(space.maximal()),
            "elastic, uniform draws": lambda: self.elastic(largest),
            "elastic, minimal": lambda: self.elastic(space.minimal()),
        }
        found = {}
        for name, step in steps.items():
            step()
            model = self.plain if name == "peft" else self.net.model
            states = self.optimizers[id(model)].state.values()
            moments = (t for state in states for t in state.values() if torch.is_tensor(t))
            given = (*model.parameters(), *model.buffers(), *moments, *self.batch.values())
            with Meter(given).recording() as found[name]:
                step()
        drawn = []
        for sub in self.draws:
            with Meter(()).recording() as meter:
                self.elastic(sub)
            drawn.append(meter.flops)
        found["elastic, uniform draws"].flops = statistics.mean(drawn)
        draws = found["elastic, uniform draws"]
        found |= {f"{name}{GRAPH}": meter for name, meter in found.items()}
        return {**found, MADE_UP: draws, "peft again (control)": found["peft"]}


def batch_of(vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :-ANSWER] = IGNORED
    mask = torch.ones_like(ids)
    batch = {"input_ids": ids, "position_ids": mask.cumsum(1) - 1, "labels": labels}
    if not CUDA:  # with a mask, what follows depends on its values, which no graph can wait for
        batch["attention_mask"] = mask
    return {key: value.to(DEVICE) for key, value in batch.items()}


def busiest(step: Callable[[], None], rows: int = 8) -> dict[str, float]:
    """Where the time of a step goes: share of each operator, the largest first."""
    step()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with profile(activities=kinds) as found:
        step()
    key = "self_device_time_total" if CUDA else "self_cpu_time_total"
    times = {event.key: getattr(event, key) for event in found.key_averages()}
    total = sum(times.values())
    top = sorted(times.items(), key=lambda item: -item[1])[:rows]
    return {name: round(time / total, 3) for name, time in top}


def measured(steps: Steps, repetitions: int) -> dict[str, dict]:
    """Seconds, and the ratios to PEFT of seconds, operations and peak memory beside the weights;
    over the operations what is replayed from a graph is compared with PEFT from a graph."""
    found, meters = sides(steps.candidates(), repetitions, baseline="peft"), steps.metered()
    for name, row in found.items():
        row["operations"] = meters[name].flops / meters["peft"].flops
        beside = found["peft" + GRAPH] if name.endswith(GRAPH) else found["peft"]
        row["over_operations"] = row["ratio"] / beside["ratio"] / row["operations"]
        row["peak_memory"] = meters[name].peak / meters["peft"].peak
    return found


def growth() -> Iterator[tuple[str, Callable[[], Steps]]]:
    """The step as layers, width and groups grow."""
    for layers in (4, 8, 16):
        yield f"{layers} layers of 512", lambda n=layers: Steps(llama(n, hidden=512))
    for hidden in (256, 512, 1024):
        yield f"8 layers of {hidden}", lambda n=hidden: Steps(llama(8, hidden=n))
    for space, groups in (("llama", "3"), (str(Path(__file__).parent / "fine.yaml"), "7")):
        yield (
            f"8 layers of 512, {groups} groups each",
            lambda name=space: Steps(llama(8, hidden=512), name),
        )


def profiles(steps: Steps) -> dict[str, dict[str, float]]:
    space = steps.net.space
    return {
        "peft": busiest(steps.peft),
        "elastic, maximal": busiest(lambda: steps.elastic(space.maximal())),
        "elastic, minimal": busiest(lambda: steps.elastic(space.minimal())),
    }


def over_operations(steps: Steps, repetitions: int) -> dict[str, float]:
    """Ratios of seconds to PEFT over those of operations."""
    found = measured(steps, repetitions)
    ratios = {row.removeprefix("elastic, "): value["over_operations"] for row, value in
              found.items() if row != "peft"}  # fmt: skip
    return {"peft_ms": found["peft"]["median_ms"], **ratios}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    parser.add_argument("--smollm2", help="folder of SmolLM2; unset, that of the wheel")
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument("--parts", nargs="+", default=["smollm2", "llama", "growth"])
    given = parser.parse_args()

    def smollm2() -> torch.nn.Module:
        folder = given.smollm2 or loading.locate("smollm2")
        return loading.load_model(folder, ModelConfig(path=folder, dtype="float32", device="cpu"))

    result = "step-cuda" if CUDA else "step"
    file = RESULTS / f"{result}.json"
    earlier = json.loads(file.read_text()) if file.is_file() else {"rows": {}}
    rows, profile, grown = earlier["rows"], earlier.get("profile", {}), earlier.get("growth", {})
    for part, name, make in (
        ("smollm2", "SmolLM2-135M", smollm2),
        ("llama", "random Llama, 32 layers of 1024",
         lambda: llama(32, hidden=1024, intermediate=2816)),
    ):  # fmt: skip
        if part in given.parts:
            steps = Steps(make())
            for row, found in measured(steps, given.repetitions).items():
                rows[f"{name}: {row}"] = found
            profile[name] = profiles(steps)
            del steps
    if "growth" in given.parts:
        grown = {name: over_operations(make(), 2 * given.repetitions) for name, make in growth()}
    dtype = str(DTYPE).removeprefix("torch.")
    report(
        "step", f"training step, {dtype}, batch {BATCH} x {LENGTH}, rank {RANK}, space llama", rows,
        save=given.save, result=result, profile=profile, growth=grown,
    )  # fmt: skip


if __name__ == "__main__":
    main()
