"""What a training run shows of itself: a bar, metrics.jsonl, and losses to compare over time."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from elastic import trackers
from elastic.console import Steps, counting, say, spell
from elastic.data.answers import answer_logits, answer_loss
from elastic.data.collating import IGNORED
from elastic.files import write_json_lines
from elastic.models.modules import evaluating
from elastic.plain import parse_json, read_text, shaped
from elastic.spaces.bound import generator_for
from elastic.supernet.supernet import Supernet


class Probe:
    """Losses of the maximal, one random and the minimal sub-adapter on the same few examples.

    A step trains one sub-adapter on its own examples, so its loss says little beside the last
    one's. These are comparable from step to step, at the cost of three forward passes.
    """

    def __init__(
        self,
        net: Supernet,
        batch: Mapping[str, Tensor],
        every: int,
        seed: int,
        degree: float = 0.0,
    ) -> None:
        """`batch` as `collate` makes it; taken after every `every` optimiser steps. A part `degree`
        of what is cut is made up for."""
        self.net, self.batch, self.every, self.degree = net, dict(batch), every, degree
        subs = {
            "maximal": net.space.maximal(),
            "random": net.space.random(generator_for(seed, "probe")),
            "minimal": net.space.minimal(),
        }
        # As they are trained: an answer that a head cannot say has no finite loss.
        self.subs = {name: net.space.with_whole_vocabulary(sub) for name, sub in subs.items()}

    @torch.no_grad()
    def losses(self, model: nn.Module) -> dict[str, float]:
        """Cross-entropy per answer token, by name; dropout is off and no generator moves."""
        found = {}
        with evaluating(model):
            for name, sub in self.subs.items():
                with self.net.active(sub, self.degree):
                    logits, labels = answer_logits(model, self.batch)
                mean = answer_loss(logits, labels) / (labels != IGNORED).sum()
                found[f"loss_{name}"] = float(mean)
        return found


class Pace:
    """Examples and real tokens per second since it was last asked."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._examples = self._tokens = 0
        self._since = clock()

    def add(self, examples: int, tokens: int) -> None:
        self._examples += examples
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        now = self.clock()
        seconds = max(now - self._since, 1e-9)
        rates = {
            "examples_per_second": self._examples / seconds,
            "tokens_per_second": self._tokens / seconds,
        }
        self._examples, self._tokens, self._since = 0, 0, now
        return rates


class MetricsFile(TrainerCallback):
    """One JSON object per optimiser step in train/metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        # Steps after the checkpoint are trained again; their old lines must not stay.
        kept = []
        if self.path.is_file():
            # A kill may have cut the last line short: it ends without a line break.
            lines = read_text(self.path).splitlines(keepends=True)
            rows = [parse_json(line, self.path) for line in lines if line.endswith("\n")]
            steps = [shaped(row, {"step": int}, self.path)["step"] for row in rows]
            kept = [row for row, step in zip(rows, steps, strict=True) if step <= state.global_step]
        write_json_lines(self.path, kept)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        row = {name: float(value) for name, value in (logs or {}).items() if _is_finite(value)}
        if "loss" in row and state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **row}) + "\n")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class Bar(TrainerCallback):
    """How far training is, with the stage, the latest losses and the pace. Whoever made it closes
    it: a step that fails ends no training."""

    def __init__(self) -> None:
        self._under_way = contextlib.ExitStack()
        self._steps: Steps | None = None
        self._probed = self._text = ""

    def close(self) -> None:
        self._under_way.close()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._steps = self._under_way.enter_context(
            counting("training", state.max_steps, state.global_step)
        )

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        if "loss_maximal" in logs:
            three = (logs[f"loss_{name}"] for name in ("maximal", "random", "minimal"))
            self._probed = " (maximal {:.2f}, random {:.2f}, minimal {:.2f})".format(*three)
        # The first of it is what a narrow terminal shows.
        self._text = (
            f"stage {logs['stage']}, loss {logs['loss']:.3f}, "
            f"{logs['examples_per_second']:.1f} examples/s{self._probed}, "
            f"lr {logs['learning_rate']:.1e}"
        )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._steps:
            self._steps.to(state.global_step, self._text)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.close()
        if self._steps and self._text:
            say(f"Trained {state.global_step} steps in {spell(self._steps.seconds)}: {self._text}")


def check_trackers(names: list[str]) -> None:
    """What `trackers.require` raises for one that the Trainer cannot use."""
    from transformers.integrations import get_available_reporting_integrations

    trackers.require(names, get_available_reporting_integrations())


class BeforeOptimizer(TrainerCallback):
    """Calls a function between clipping and the optimiser's step."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.act()


def reporting(names: list[str], folder: Path) -> tuple[list[str], list[TrainerCallback]]:
    """What the Trainer's `report_to` gets, and callbacks beside it: TensorBoard's files belong to
    the run, while the Trainer would put them among checkpoints that do not last."""
    if "tensorboard" not in names:
        return names, []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    writer = TensorBoardCallback(SummaryWriter(str(folder)))
    return [name for name in names if name != "tensorboard"], [writer]
