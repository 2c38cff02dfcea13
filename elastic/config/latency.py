"""Settings of timing: the runtime, the prompt, the rounds, a table kept in a file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, get_args

from elastic.config.numbers import require_numbers
from elastic.errors import require

Graph = Literal["onnx", "openvino"]
"""Formats that are graphs; each has the name of the runtime it is for."""
GRAPHS: tuple[str, ...] = get_args(Graph)
RoundedTo = Literal["int8", "int8_sym", "int4", "int4_sym"]
"""Compressions whose codes follow from the weights alone, so that accuracy is known without a
graph."""


@dataclass(frozen=True, kw_only=True)
class TimingConfig:
    """How latency is measured: the full model and the candidate take turns."""

    runtime: Literal["torch", Graph] = "torch"
    """onnx and openvino run in float32."""
    merged: bool = True
    """Fold the factors into the weights first. Unmerged ones cost time, the more the larger their
    rank; torch only."""
    prompt_tokens: int = 64
    """Length of every prompt that is timed."""
    new_tokens: int = 4
    """Decode steps per round; a classifier has none."""
    batch: int = 1
    """Prompts that are timed together."""
    rounds: int = 5
    """At least this many rounds; more until IQR / median < 0.1 and the control is within the
    tolerance."""
    max_rounds: int = 20
    """At most this many."""
    tolerance: float = 0.03
    """How much the full model may differ from itself before a measurement is called noisy."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "batch", "rounds"):
            require(getattr(self, name) >= 1, f"timing.{name} must be at least 1")
        require(self.new_tokens >= 0, "timing.new_tokens must be at least 0")
        require(
            self.max_rounds >= self.rounds,
            f"timing.max_rounds is {self.max_rounds}, below timing.rounds {self.rounds}",
        )
        require(
            self.merged or self.runtime == "torch",
            f"timing.merged false: what is written for {self.runtime} is merged; choose torch",
        )


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """The latency table: what every choice costs on the target, learnt from a few whole models."""

    file: list[str] = field(default_factory=list)
    """Tables written by `elastic latency --save`, of one device, one for every precision; where
    there is none, one is measured here, once for a model, device, runtime and shapes."""
    target: str | None = None
    """The device `file` was recorded on, when it is not this one."""
    seen: int = 9
    """Sub-adapters that the table is learnt from."""
    unseen: int = 4
    """Others, on which its error is measured."""
    rounds: int = 5
    """Rounds in which all take turns, on a busy machine too: what is amiss in the times of one
    sub-adapter, those of the others make up for."""

    def __post_init__(self) -> None:
        require(self.seen >= 2, f"table.seen is {self.seen}; at least 2")
        require(self.rounds >= 1, f"table.rounds is {self.rounds}; at least 1")
        require(self.unseen >= 0, f"table.unseen is {self.unseen}; at least 0")
        require(
            self.target is None or bool(self.file),
            f"table.target {self.target!r}: say which file was recorded there, table.file",
        )


def require_graph(compress: Collection[str], timing: TimingConfig) -> None:
    """ConfigError for compressed weights in a runtime that has none."""
    require(
        not compress or timing.runtime != "torch",
        f"compress {', '.join(compress)}: it is graphs whose weights are compressed; give "
        f"timing.runtime {' or '.join(GRAPHS)}",
    )


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """Times one sub-adapter, as it would be deployed, against the full model; with `save`, records
    the latency table of this device instead."""

    run: str = "runs/default"
    """The run directory of a trained super-adapter."""
    sub_adapter: str = "best"
    """best (of the search), maximal, heuristic, minimal, uniform-FRACTION, a name of the front,
    or a JSON file."""
    compress: Literal["chosen", "none", RoundedTo] = "chosen"
    """The sub-adapter's weights have so few bits, the full model's not. chosen: as the search chose
    for it."""
    save: str | None = None
    """Where to write the table, for `elastic search RUN --table.file FILE`."""
    timing: TimingConfig = field(default_factory=lambda: TimingConfig(rounds=10))
    table: TableConfig = field(default_factory=TableConfig)
    seed: int = 0
    """Of the prompts that are timed and the sub-adapters that the table is learnt from."""

    def __post_init__(self) -> None:
        require_numbers(self)
        named = self.compress not in ("chosen", "none")
        require_graph([self.compress] if named else [], self.timing)
