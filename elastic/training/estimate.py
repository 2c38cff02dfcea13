"""What a dry run found, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from elastic.console import wide
from elastic.data.collating import collate
from elastic.data.encoding import Encoded
from elastic.models.kinds import Kind, kind_of
from elastic.supernet.compensation import Footprint
from elastic.supernet.summary import SpaceTable, short

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch: every sequence as long as the longest."""

    sequences: int
    length: int
    """Tokens, padded; of the prompt alone for an encoder-decoder model."""
    answer: int
    """Tokens that have logits; 0 for a classifier."""
    assumed: str = ""
    """Why the lengths could not be read from the data; empty if they were."""

    def tensors(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """As training collates them, int64."""
        text, answer = (0,) * self.length, (0,) * self.answer
        row = {
            Kind.CLASSIFIER: Encoded(text, 0, label=0),
            Kind.ENCODER_DECODER: Encoded(answer, self.answer, text),
        }.get(kind_of(model), Encoded(text, self.answer))
        return collate([row] * self.sequences, pad=0)


@dataclass(frozen=True)
class Plan:
    """How long training takes."""

    tasks: int
    examples: int
    stages: int
    steps: int
    """Optimiser steps of all tasks and stages."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the fullest moment of a micro-batch of the maximal sub-adapter, in one process;
    without what the device's libraries take for themselves. None is unknown."""

    base: int
    factors: int
    gradients: int
    moments: int
    """Adam's two."""
    activations: int | None = None
    """What the forward pass saves for the backward pass, beside weights."""
    temporaries: int | None = None
    """Logits, their gradients and whatever else lives beside the activations."""

    @property
    def total(self) -> int | None:
        if self.activations is None or self.temporaries is None:
            return None
        return sum(vars(self).values())


@dataclass(frozen=True)
class Compute:
    """Floating-point operations, forward and backward. The regulariser and the optimiser are not
    counted."""

    maximal: int
    """Of one micro-batch of the maximal sub-adapter."""
    minimal: int
    step: tuple[int, int]
    """From, to: an optimiser step of the last stage, as its sub-adapters happen to be drawn."""
    run: tuple[int, int] | None
    """From, to: all steps, were every batch the largest; None if their number is unknown."""


@dataclass(frozen=True)
class Estimate(SpaceTable):
    """What `elastic train --dry_run` found."""

    parameters: int
    dtype: str
    method: str
    trained: int
    """Parameters that training changes."""
    trained_by: Mapping[str, int]
    """The same for a single task, with every method that fits model and rank."""
    batch: Batch
    accumulation: int
    plan: Plan | None
    """None if the data is not there."""
    memory: Memory
    compute: Compute | None
    compensation: Footprint
    device: str
    """Whose kernels memory and compute belong to."""
    notes: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        plain = super().as_dict()
        plain["memory"]["total"] = self.memory.total
        return plain

    def show(self) -> None:
        console = wide()
        for table in self.tables():
            console.print(table)
        for line in self._lines():
            console.print(line, highlight=False, soft_wrap=True)
        print(json.dumps(self.as_dict()))

    def tables(self) -> list[Table]:
        from rich.table import Table

        memory = Table("", "bytes", title=f"Memory of one micro-batch ({self.device})")
        for name, size in {**vars(self.memory), "total": self.memory.total}.items():
            memory.add_row(name, short(size, "B"), end_section=name == "temporaries")
        memory.columns[1].justify = "right"
        return [*super().tables(), memory]

    def _lines(self) -> list[str]:
        batch, plan, compute = self.batch, self.plan, self.compute
        methods = ", ".join(f"{name} {count:,}" for name, count in self.trained_by.items())
        whole = ""
        if compute and compute.run:
            whole = f"; {_span(compute.run)} in all, were every batch so long"
        of = f", {batch.answer} of the answer" if batch.answer else ""
        lines = [
            f"Base: {self.architecture}, {self.parameters:,} parameters, {self.dtype}",
            f"Trained: {self.trained:,} parameters with {self.method}; one task at this rank by "
            f"method: {methods}",
            f"Micro-batch: {batch.sequences} sequences of {batch.length} tokens{of}"
            + (f"; assumed, since {batch.assumed}" if batch.assumed else ""),
        ]
        if plan:
            tasks = f"{plan.tasks} tasks, " if plan.tasks > 1 else ""
            lines.append(
                f"Training: {tasks}{plan.examples} examples, {plan.stages} stages, {plan.steps} "
                f"steps of {self.accumulation} micro-batches"
            )
        if compute:
            lines.append(
                f"Compute: {short(compute.maximal, 'FLOP')} per micro-batch maximal, "
                f"{short(compute.minimal, 'FLOP')} minimal; {_span(compute.step)} per step{whole}"
            )
        made_up = self.compensation
        if made_up.saved:
            lines.append(
                f"Compensation of cut channels: {short(made_up.saved, 'B')} of moments in the "
                f"super-adapter, {short(made_up.calibration, 'B')} while calibrating; all choices "
                f"solved {short(made_up.solutions, 'B')} (compensation.room_mb bounds it)"
            )
        return lines + [f"Note: {note}" for note in self.notes]


def _span(flops: tuple[int, int]) -> str:
    low, high = (short(number, "FLOP") for number in flops)
    return low if low == high else f"{low} to {high}"
