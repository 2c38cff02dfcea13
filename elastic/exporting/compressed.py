"""Graphs whose weights have fewer bits: how they are written, and what they are held to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.exporting.contract import Format, Source, Which
from elastic.files import read_json, write_json
from elastic.formats import compression, graphs
from elastic.formats.compression import calibration_inputs
from elastic.models.kinds import Kind, kind_of

if TYPE_CHECKING:
    from elastic.formats.runner import Runner
    from elastic.latency.weigh import Load


class Compressed(Format):
    """A graph whose weights have fewer bits, beside the full model's graph as it is."""

    def __init__(self, kind: str, whole: Format, mode: str) -> None:
        self.kind, self.whole, self.mode = kind, whole, mode
        self.runtime = self.whole.runtime

    def require(self) -> None:
        self.whole.require()
        if self.kind in compression.MODES[self.mode].formats:
            compression.check(self.mode, self.kind)

    def why_not(self, source: Source) -> str | None:
        known = compression.MODES[self.mode].formats
        if self.kind not in known:
            return f"NNCF has {self.mode} for {' and '.join(known)} alone"
        paired = kind_of(source.models["compact"]) is Kind.ENCODER_DECODER
        if paired and compression.MODES[self.mode].calibrated:
            return "activations are not computed for the two graphs of an encoder-decoder model"
        return self.whole.why_not(source)

    def why_whole_vocabulary(self, source: Source) -> str | None:
        return self.whole.why_whole_vocabulary(source)

    def write(self, source: Source, which: Which, directory: Path) -> None:
        examples = []
        if compression.MODES[self.mode].calibrated:
            chosen = source.train[: source.config.compress_examples]
            examples = calibration_inputs(source.base.tokenizer, source.models[which], chosen)
        graph = graphs.MODULES[self.kind].graph_in(source.folder(self.kind, which))
        made = compression.compress(graph, directory, self.mode, examples)
        write_json(directory / "compression.json", made.as_dict())
        source.accompany(which, directory, self.kind)

    def open(self, source: Source, which: Which, directory: Path) -> Runner:
        return self.whole.open(source, which, directory)

    def exact(self, source: Source, directory: Path, runner: Runner) -> Runner:
        return self.whole.exact(source, directory, runner)

    def limit(self, source: Source) -> float | None:
        return None  # it rounds on purpose

    def full(self, source: Source, kind: str) -> Runner:
        return self.whole.full(source, self.kind)

    def precision(self, source: Source, runner: Runner) -> str:
        return f"{self.mode}, {self.whole.precision(source, runner)}"

    def loads(self, source: Source, kind: str, directory: Path) -> tuple[Load, Load]:
        return self.whole.loads(source, self.kind, directory)

    def about(self, source: Source, directory: Path) -> dict[str, Any]:
        compressed = read_json(directory / "compression.json")
        return {"compression": compressed, **self.whole.about(source, directory)}
