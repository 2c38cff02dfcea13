"""What every way to write a model keeps, and what of an export it is given.

The compact model goes to its place; the full one, beside which it is judged, to a scratch folder. A
format that is made from another one (OpenVINO from the ONNX graph) asks for that one's folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from elastic.config import ExportConfig, ModelConfig
from elastic.data.task import Example
from elastic.evaluation.in_runtime import score
from elastic.evaluation.statistics import Score
from elastic.exporting.every_size import EverySize
from elastic.formats import pipelines
from elastic.formats.runner import Runner
from elastic.latency.weigh import Load
from elastic.models import loading
from elastic.spaces.bound import SubAdapter
from elastic.supernet.supernet import Supernet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Which = Literal["compact", "full"]


@dataclass
class Source:
    """What is written, and where each of it is by now."""

    config: ExportConfig
    net: Supernet
    sub: SubAdapter
    models: dict[Which, PreTrainedModel]
    """Merged: the sub-adapter cut out, and the maximal one."""
    base: loading.Base
    trained: ModelConfig
    formats: Mapping[str, Format]
    """By name; those that one is made from, or judged beside, are among them."""
    scratch: Path
    """For what is not kept."""
    every_size: EverySize
    """Whatever else of the run can be chosen."""
    name: str = ""
    """Of the sub-adapter."""
    train: Sequence[Example] = ()
    """Training examples, for what looks at activations."""
    folders: dict[tuple[str, Which], Path] = field(default_factory=dict)
    pipelines: dict[Path, dict[str, str]] = field(default_factory=dict)
    """By folder, what a runtime's own pipeline cannot do with it."""
    scores: dict[str, Score] = field(default_factory=dict)
    """Of the full model, by runtime."""
    uncut: Source | None = None
    """The same with a head that computes all tokens, where `sub` has one that does not: for formats
    without a place for it."""

    def of(self, kind: str) -> Source:
        """What is written in this format."""
        cannot = self.uncut and self.formats[kind].why_whole_vocabulary(self)
        return self.uncut if self.uncut and cannot else self

    def folder(self, kind: str, which: Which) -> Path:
        """Where this model is written in this format; written now if it is not."""
        if (kind, which) not in self.folders:
            self.write(kind, which, self.scratch / f"{which}-{kind}")
        return self.folders[kind, which]

    def write(self, kind: str, which: Which, directory: Path) -> None:
        self.formats[kind].write(self, which, directory)
        self.folders[kind, which] = directory

    def accompany(self, which: Which, directory: Path, runtime: str) -> None:
        """What stands beside a graph, so that its folder is all that a pipeline needs."""
        model, tokenizer = self.models[which], self.base.tokenizer
        self.pipelines[directory] = pipelines.companions(
            model, tokenizer, directory, runtime, logits=self.config.logits
        )


class Format:
    """One way to write models; the contract, and what most keep."""

    runtime: str | None = None
    """What runs them (`elastic.latency.weigh.LOADERS`); None where nothing here does."""

    def require(self) -> None:
        """MissingExtra unless this can be written and run here; asked before anything slow."""

    def why_not(self, source: Source) -> str | None:
        """Why this sub-adapter is not written; None if it is."""

    def why_whole_vocabulary(self, source: Source) -> str | None:
        """Why a head that computes some tokens alone is written with all of them; None if it has a
        place."""
        return "this format has no place for a head of some tokens"

    def write(self, source: Source, which: Which, directory: Path) -> None:
        """A new folder with this model in it."""
        raise NotImplementedError

    def open(self, source: Source, which: Which, directory: Path) -> Runner:
        """The model that was written there, loaded in its runtime, as a user would run it."""
        raise NotImplementedError

    def exact(self, source: Source, directory: Path, runner: Runner) -> Runner:
        """The compact one at the precision at which it has to be the supernet: `runner`, unless its
        runtime rounds."""
        return runner

    def limit(self, source: Source) -> float | None:
        """How far its logits may be off, in parts of the largest; None where it rounds on
        purpose."""
        return 2e-4

    def full(self, source: Source, kind: str) -> Runner:
        """The full model in the same runtime."""
        return self.open(source, "full", source.folder(kind, "full"))

    def timed(self, source: Source, runner: Runner) -> Runner:
        """The one that is timed, of an opened one."""
        return runner

    def device(self, source: Source) -> str:
        return "cpu"

    def precision(self, source: Source, runner: Runner) -> str:
        """In which it computes when it is deployed."""
        return "float32"

    def as_torch(self, source: Source, runner: Runner) -> bool:
        """Whether it computes what the compact model in memory does, with the same operations."""
        return False

    def score(
        self, source: Source, which: Which, runner: Runner, examples: Sequence[Example]
    ) -> Score:
        """How often it is right, asked in its runtime."""
        model, tokenizer = source.models[which], source.base.tokenizer
        label = f"scoring the {which} model in {self.runtime}"
        return score(runner, model, tokenizer, examples, label=label)

    def score_full(self, source: Source, kind: str, examples: Sequence[Example]) -> Score:
        """The same of the full model: asked once, for all that share its runtime."""
        runtime = self.runtime or kind
        if runtime not in source.scores:
            full = self.full(source, kind)
            source.scores[runtime] = self.score(source, "full", full, examples)
        return source.scores[runtime]

    def loads(self, source: Source, kind: str, directory: Path) -> tuple[Load, Load]:
        """The written model and the full one, as they are weighed."""
        full = source.folder(kind, "full")
        return self._load(source, directory), self._load(source, full)

    def _load(self, source: Source, folder: Path, **settings: Any) -> Load:
        timing = source.config.timing
        return Load(
            runtime=self.runtime or "", folder=str(folder), batch=timing.batch,
            prompt_tokens=timing.prompt_tokens, settings=settings,
        )  # fmt: skip

    def about(self, source: Source, directory: Path) -> dict[str, Any]:
        """What the report says of this format alone."""
        return {}
