"""Every format in one shape: a model is written into a folder, and runs from there.

The compact model goes to its place; the full one, beside which it is judged, to a scratch folder. A
format that is made from another one (OpenVINO from the ONNX graph) asks for that one's folder.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from elastic import compression, foreign, models
from elastic.adapters.attach import dequantise_
from elastic.calibration import calibration_inputs
from elastic.config import ModelConfig
from elastic.errors import ExportError, MissingExtra
from elastic.evaluate import Score, evaluate
from elastic.export_config import GRAPHS, ExportConfig
from elastic.files import read_json, write_json
from elastic.formats import genai, gguf, hf, onnx, openvino, peft
from elastic.formats.padding import padded
from elastic.formats.weigh import Load
from elastic.run import as_plain
from elastic.runners import Runner, runner_of, timed_runner
from elastic.scoring import score
from elastic.space import SubAdapter
from elastic.supernet import Supernet
from elastic.tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Which = Literal["compact", "full"]


@dataclass(frozen=True)
class Source:
    """What is written, and where each of it is by now."""

    config: ExportConfig
    net: Supernet
    sub: SubAdapter
    models: dict[Which, PreTrainedModel]
    """Merged: the sub-adapter cut out, and the maximal one."""
    base: models.Base
    trained: ModelConfig
    scratch: Path
    """For what is not kept."""
    name: str = ""
    """Of the sub-adapter."""
    train: Sequence[Example] = ()
    """Training examples, for what looks at activations."""
    folders: dict[tuple[str, Which], Path] = field(default_factory=dict)
    pipelines: dict[Path, dict[str, str]] = field(default_factory=dict)
    """By folder, what a runtime's own pipeline cannot do with it."""
    scores: dict[str, Score] = field(default_factory=dict)
    """Of the full model, by runtime."""

    def folder(self, kind: str, which: Which) -> Path:
        """Where this model is written in this format; written now if it is not."""
        if (kind, which) not in self.folders:
            self.write(kind, which, self.scratch / f"{which}-{kind}")
        return self.folders[kind, which]

    def write(self, kind: str, which: Which, directory: Path) -> None:
        FORMATS[kind].write(self, which, directory)
        self.folders[kind, which] = directory

    def accompany(self, which: Which, directory: Path, runtime: str) -> None:
        """What stands beside a graph, so that its folder is all that a pipeline needs."""
        model, tokenizer = self.models[which], self.base.tokenizer
        self.pipelines[directory] = genai.companions(
            model, tokenizer, directory, runtime, logits=self.config.logits
        )


class Format:
    """One way to write models; the contract, and what most keep."""

    runtime: str | None = None
    """What runs them (`elastic.formats.weigh.RUNTIMES`); None where nothing here does."""

    def require(self) -> None:
        """MissingExtra unless this can be written and run here; asked before anything slow."""

    def why_not(self, source: Source) -> str | None:
        """Why this sub-adapter is not written; None if it is."""

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
        if self.runtime not in source.scores:
            full = self.full(source, kind)
            source.scores[self.runtime] = self.score(source, "full", full, examples)
        return source.scores[self.runtime]

    def loads(self, source: Source, kind: str, directory: Path) -> tuple[Load, Load]:
        """The written model and the full one, as they are weighed."""
        return tuple(
            self._load(source, folder) for folder in (directory, source.folder(kind, "full"))
        )

    def _load(self, source: Source, folder: Path, runtime: str = "", **settings: Any) -> Load:
        timing = source.config.timing
        return Load(
            runtime=runtime or self.runtime, folder=str(folder), batch=timing.batch,
            prompt_tokens=timing.prompt_tokens, settings=settings,
        )  # fmt: skip

    def about(self, source: Source, directory: Path) -> dict[str, Any]:
        """What the report says of this format alone."""
        return {}


class _Torch(Format):
    """Runs in transformers, on the device of the run."""

    def limit(self, source: Source) -> float | None:
        return 1e-9 if source.models["compact"].dtype == torch.float64 else 1e-4

    def timed(self, source: Source, runner: Runner) -> Runner:
        return timed_runner(runner.model, source.config.timing)

    def device(self, source: Source) -> str:
        return str(source.models["compact"].device)

    def precision(self, source: Source, runner: Runner) -> str:
        return str(runner.model.dtype).removeprefix("torch.")

    def as_torch(self, source: Source, runner: Runner) -> bool:
        return runner.model.dtype == source.models["compact"].dtype

    def score(
        self, source: Source, which: Which, runner: Runner, examples: Sequence[Example]
    ) -> Score:
        return evaluate(
            runner.model, source.base.tokenizer, examples,
            batch_tokens=source.config.batch_tokens,
            label=f"scoring the {which} model in {self.runtime}",
        )  # fmt: skip


class Hf(_Torch):
    """In the type the base model was saved in; reloading is bit for bit at that type."""

    runtime = "hf"

    def write(self, source: Source, which: Which, directory: Path) -> None:
        tokenizer = source.base.tokenizer
        hf.write(
            self._model(source, which), tokenizer, directory, dtype=_stored(source),
            max_shard_size=source.config.hf.max_shard_size,
        )  # fmt: skip

    def _model(self, source: Source, which: Which) -> PreTrainedModel:
        model = source.models[which]
        if which == "compact" and source.config.hf.padded:
            return padded(model, source.net.space, source.sub)
        return model

    def open(self, source: Source, which: Which, directory: Path) -> Runner:
        stored, model = _stored(source), self._model(source, which)
        loaded = hf.load(directory, stored, source.trained.trust_remote_code)
        for name, tensor in model.state_dict().items():
            if not torch.equal(loaded.state_dict()[name], tensor.to(stored).cpu()):
                raise ExportError(f"hf: {name} is not the same bit for bit after reloading")
        return runner_of(loaded.to(model.device))

    def limit(self, source: Source) -> float | None:
        # Rounding to a narrower stored type is the user's choice of base, not a fault.
        narrow = _stored(source) not in (torch.float32, torch.float64)
        return None if narrow else super().limit(source)

    def full(self, source: Source, kind: str) -> Runner:
        full = source.models["full"]
        return runner_of(full) if full.dtype == _stored(source) else super().full(source, kind)

    def _load(self, source: Source, folder: Path, runtime: str = "", **settings: Any) -> Load:
        dtype, device = str(_stored(source)).removeprefix("torch."), self.device(source)
        trusted = source.trained.trust_remote_code
        return super()._load(source, folder, dtype=dtype, device=device, trust_remote_code=trusted)


class Peft(_Torch):
    """On the untouched base model, in memory as on disk."""

    runtime = "peft"

    def why_not(self, source: Source) -> str | None:
        if source.config.merge.adapters:
            return "merged with other adapters, whose sum need not have a low rank"
        return peft.why_not(source.net, source.sub)

    def write(self, source: Source, which: Which, directory: Path) -> None:
        peft.write(
            source.net, source.sub, directory,
            base_model=source.trained.path, base_digest=source.base.digest,
        )  # fmt: skip

    def open(self, source: Source, which: Which, directory: Path) -> Runner:
        from peft import PeftModel

        # Dense like the full model it is timed against.
        folder = models.locate(source.trained.path)
        plain = dequantise_(models.load_model(folder, source.trained))
        adapted = PeftModel.from_pretrained(plain, str(directory)).eval()
        return runner_of(adapted.get_base_model())

    def full(self, source: Source, kind: str) -> Runner:
        return runner_of(source.models["full"])

    def loads(self, source: Source, kind: str, directory: Path) -> tuple[Load, Load]:
        _, full = FORMATS["hf"].loads(source, "hf", directory)
        dtype = source.trained.dtype
        settings = {**full.settings, "dtype": dtype}
        own = self._load(
            source, directory, device=self.device(source),
            model=as_plain(dataclasses.replace(source.trained, quantise="none")),
        )  # fmt: skip
        return own, dataclasses.replace(full, settings=settings)

    def about(self, source: Source, directory: Path) -> dict[str, Any]:
        return {"rank": read_json(directory / foreign.PEFT_CONFIG)["r"]}


class Onnx(Format):
    runtime = "onnx"

    def require(self) -> None:
        onnx.require()
        if importlib.util.find_spec("onnxruntime") is None:
            raise MissingExtra("onnxruntime", "onnx", "running ONNX models")

    def why_not(self, source: Source) -> str | None:
        return models.no_graph(source.models["compact"].config)

    def write(self, source: Source, which: Which, directory: Path) -> None:
        model = source.models[which]
        wide = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
        onnx.write(wide, directory, logits=source.config.logits)
        source.accompany(which, directory, "onnx")

    def open(self, source: Source, which: Which, directory: Path) -> Runner:
        return onnx.open_folder(directory)

    def about(self, source: Source, directory: Path) -> dict[str, Any]:
        return {"pipelines": source.pipelines[directory]}


class Openvino(Format):
    """Compared in float32, run at the precision that the device chooses."""

    runtime = "openvino"

    def require(self) -> None:
        onnx.require()
        openvino.require()

    def why_not(self, source: Source) -> str | None:
        return models.no_graph(source.models["compact"].config)

    def write(self, source: Source, which: Which, directory: Path) -> None:
        try:
            graph = source.folder("onnx", which)
        except ExportError as error:
            raise ExportError(f"openvino, by way of {error}") from error
        openvino.write(onnx.graph_in(graph), directory)
        source.accompany(which, directory, "openvino")

    def open(self, source: Source, which: Which, directory: Path) -> Runner:
        return openvino.open_folder(directory, precision=None)

    def exact(self, source: Source, directory: Path, runner: Runner) -> Runner:
        return openvino.open_folder(directory)

    def precision(self, source: Source, runner: Runner) -> str:
        return runner.precision

    def about(self, source: Source, directory: Path) -> dict[str, Any]:
        return {"pipelines": source.pipelines[directory]}


class Gguf(Format):
    """For llama.cpp, in half precision; nothing here runs it, so what was written is read back."""

    def why_not(self, source: Source) -> str | None:
        return gguf.why_not(source.models["compact"], source.base.tokenizer)

    def write(self, source: Source, which: Which, directory: Path) -> None:
        model = source.models[which]
        file = gguf.write(model, source.base.tokenizer, directory, name=source.name)
        gguf.check(file, model)


class Compressed(Format):
    """A graph whose weights have fewer bits, beside the full model's graph as it is."""

    def __init__(self, kind: str, mode: str) -> None:
        self.kind, self.mode, self.whole = kind, mode, FORMATS[kind]
        self.runtime = self.whole.runtime

    def require(self) -> None:
        self.whole.require()
        if self.kind in compression.MODES[self.mode].formats:
            compression.check(self.mode, self.kind)

    def why_not(self, source: Source) -> str | None:
        known = compression.MODES[self.mode].formats
        if self.kind not in known:
            return f"NNCF has {self.mode} for {' and '.join(known)} alone"
        paired = source.models["compact"].config.is_encoder_decoder
        if paired and compression.MODES[self.mode].calibrated:
            return "activations are not computed for the two graphs of an encoder-decoder model"
        return self.whole.why_not(source)

    def write(self, source: Source, which: Which, directory: Path) -> None:
        examples = []
        if compression.MODES[self.mode].calibrated:
            chosen = source.train[: source.config.compress_examples]
            examples = calibration_inputs(source.base.tokenizer, source.models[which], chosen)
        find = {"onnx": onnx, "openvino": openvino}[self.kind].graph_in
        graph = find(source.folder(self.kind, which))
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


FORMATS: dict[str, Format] = {
    "hf": Hf(),
    "peft": Peft(),
    "onnx": Onnx(),
    "openvino": Openvino(),
    "gguf": Gguf(),
}
FORMATS |= {
    f"{kind}-{mode}": Compressed(kind, mode) for kind in GRAPHS for mode in compression.MODES
}


def _stored(source: Source) -> torch.dtype:
    """The type that Hugging Face folders are written in."""
    dtype = source.models["compact"].dtype
    return dtype if dtype == torch.float64 else models.stored_dtype(source.trained) or dtype
