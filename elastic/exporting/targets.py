"""Every way to write a model, in one shape: it is written into a folder, and runs from there."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from elastic.config.latency import GRAPHS
from elastic.data.task import Example
from elastic.errors import ExportError
from elastic.evaluation.evaluate import evaluate
from elastic.evaluation.statistics import Score
from elastic.exporting.compressed import Compressed
from elastic.exporting.contract import Format, Source, Which
from elastic.files import read_json
from elastic.formats import (
    gguf,
    graphs,
    hf,
    nemotron_nas,
    onnx,
    openvino,
    padding,
    peft,
    slices,
    text_only,
)
from elastic.formats.compression import MODES
from elastic.formats.runner import Runner, runner_of
from elastic.formats.text_only import as_text
from elastic.latency.runtime import timed_runner
from elastic.latency.weigh import Load
from elastic.models import loading
from elastic.models.kinds import kind_of, no_graph
from elastic.models.modules import dequantise_
from elastic.run import as_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Torch(Format):
    """Runs in transformers, on the device of the run."""

    def limit(self, source: Source) -> float | None:
        return 1e-9 if source.models["compact"].dtype == torch.float64 else 1e-4

    def timed(self, source: Source, runner: Any) -> Runner:
        return timed_runner(runner.model, source.config.timing)

    def device(self, source: Source) -> str:
        return str(source.models["compact"].device)

    def precision(self, source: Source, runner: Any) -> str:
        return str(runner.model.dtype).removeprefix("torch.")

    def as_torch(self, source: Source, runner: Any) -> bool:
        return runner.model.dtype == source.models["compact"].dtype

    def score(
        self, source: Source, which: Which, runner: Any, examples: Sequence[Example]
    ) -> Score:
        return evaluate(
            runner.model, source.base.tokenizer, examples,
            batch_tokens=source.config.batch_tokens,
            label=f"scoring the {which} model in {self.runtime}",
        )  # fmt: skip


class _AsStored(_Torch):
    """A folder whose tensors are the compact model's, rounded to the type that the base is in."""

    def limit(self, source: Source) -> float | None:
        # Rounding to a narrower stored type is the user's choice of base, not a fault.
        narrow = _stored(source) not in (torch.float32, torch.float64)
        return None if narrow else super().limit(source)

    def _same(self, source: Source, loaded: PreTrainedModel, model: PreTrainedModel) -> Runner:
        """What was loaded, on the device of the model that was written; ExportError for a tensor
        that is not the same bit for bit."""
        found, stored = loaded.state_dict(), _stored(source)
        for name, tensor in model.state_dict().items():
            kind = stored if tensor.is_floating_point() else tensor.dtype
            if not torch.equal(found[name], tensor.to(kind).cpu()):
                raise ExportError(
                    f"{self.runtime}: {name} is not the same bit for bit after reloading"
                )
        return runner_of(loaded.to(model.device))


class Hf(_AsStored):
    """In the type the base model was saved in; reloading is bit for bit at that type."""

    runtime = "hf"

    def why_not(self, source: Source) -> str | None:
        model = source.models["compact"]
        if source.config.hf.text_only and (reason := text_only.why_not(model)):
            return f"hf.text_only: {reason}"
        if source.config.hf.padded:
            reason = padding.why_not(source.net.space, source.net.space.check(source.sub))
        else:
            reason = hf.why_not(model)
        return reason or hf.why_not_untied(model)

    def why_whole_vocabulary(self, source: Source) -> str | None:
        if not source.config.hf.padded:
            return None
        return "hf.padded writes the family's own class, whose head has all of them"

    def write(self, source: Source, which: Which, directory: Path) -> None:
        tokenizer = source.base.tokenizer
        hf.write(
            self._model(source, which), tokenizer, directory, dtype=_stored(source),
            max_shard_size=source.config.hf.max_shard_size,
        )  # fmt: skip

    def _model(self, source: Source, which: Which) -> PreTrainedModel:
        model = source.models[which]
        if which == "compact" and source.config.hf.padded:
            model = padding.padded(model, source.net.space, source.sub)
        return as_text(model) if source.config.hf.text_only else model

    def open(self, source: Source, which: Which, directory: Path) -> Runner:
        stored, model = _stored(source), self._model(source, which)
        loaded = hf.load(directory, stored, source.trained.trust_remote_code)
        return self._same(source, loaded, model)

    def full(self, source: Source, kind: str) -> Runner:
        full = source.models["full"]
        return runner_of(full) if full.dtype == _stored(source) else super().full(source, kind)

    def about(self, source: Source, directory: Path) -> dict[str, Any]:
        return {"text_only": True} if source.config.hf.text_only else {}

    def _load(self, source: Source, folder: Path, **settings: Any) -> Load:
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
        folder = loading.locate(source.trained.path)
        plain = dequantise_(loading.load_model(folder, source.trained))
        adapted = PeftModel.from_pretrained(plain, str(directory)).eval()
        return runner_of(adapted.get_base_model())

    def full(self, source: Source, kind: str) -> Runner:
        return runner_of(source.models["full"])

    def loads(self, source: Source, kind: str, directory: Path) -> tuple[Load, Load]:
        _, full = source.formats["hf"].loads(source, "hf", directory)
        settings = {**full.settings, "dtype": source.trained.dtype}
        own = self._load(
            source, directory, device=self.device(source),
            model=as_plain(dataclasses.replace(source.trained, quantise="none")),
        )  # fmt: skip
        return own, dataclasses.replace(full, settings=settings)

    def about(self, source: Source, directory: Path) -> dict[str, Any]:
        return {"rank": read_json(directory / peft.PEFT_CONFIG)["r"]}


NO_MIXTURES = (
    "its space cuts or adapts mixtures of experts, and the folder holds sizes of layers alone"
)


class Elastic(_AsStored):
    """All sizes of the run in one folder, of which the chosen one is compared."""

    runtime = "elastic"

    def why_not(self, source: Source) -> str | None:
        if source.config.merge.adapters:
            return "merged with other adapters, of which the other sizes know nothing"
        if source.config.hf.uniform:
            return "hf.uniform writes a size that the run does not have"
        if source.trained.quantise != "none":
            return "its base is quantised, and the folder holds rows and columns of dense weights"
        if source.net.mixtures:
            return NO_MIXTURES
        return None

    def why_whole_vocabulary(self, source: Source) -> str | None:
        return None

    def write(self, source: Source, which: Which, directory: Path) -> None:
        every, refers = source.every_size, source.config.slices.base == "reference"
        with every.factors_of(None):
            slices.write(
                source.net, source.base.tokenizer, every.slices(), directory,
                model=source.trained, dtype=_stored(source), latencies=every.latencies(),
                max_shard_size=source.config.hf.max_shard_size,
                referred=source.base.digest if refers else None,
            )  # fmt: skip

    def open(self, source: Source, which: Which, directory: Path) -> Runner:
        name = source.every_size.name_of(source.sub)
        trusted = source.trained.trust_remote_code
        loaded = slices.load(directory, name, trust_remote_code=trusted)
        return self._same(source, loaded, source.models["compact"])

    def full(self, source: Source, kind: str) -> Runner:
        return source.formats["hf"].full(source, "hf")

    def loads(self, source: Source, kind: str, directory: Path) -> tuple[Load, Load]:
        _, full = source.formats["hf"].loads(source, "hf", directory)
        name = source.every_size.name_of(source.sub)
        return self._load(source, directory, slice=name, device=self.device(source)), full

    def about(self, source: Source, directory: Path) -> dict[str, Any]:
        return {"slices": list(slices.read(directory)["slices"])}


def _stored(source: Source) -> torch.dtype:
    """The type that Hugging Face folders are written in."""
    dtype = source.models["compact"].dtype
    return dtype if dtype == torch.float64 else loading.stored_dtype(source.trained) or dtype


class _Graph(Format):
    """Runs in the runtime of its name."""

    def require(self) -> None:
        graphs.require(str(self.runtime))

    def why_not(self, source: Source) -> str | None:
        model = source.models["compact"]
        return no_graph(kind_of(model), model.config) or text_only.why_not(model)

    def why_whole_vocabulary(self, source: Source) -> str | None:
        return None

    def about(self, source: Source, directory: Path) -> dict[str, Any]:
        return {
            "pipelines": source.pipelines[directory],
            **text_only.about(source.models["compact"]),
        }


class Onnx(_Graph):
    """Written from float32 weights, run by onnxruntime."""

    runtime = "onnx"

    def write(self, source: Source, which: Which, directory: Path) -> None:
        model = source.models[which]
        wide = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
        onnx.write(wide, directory, logits=source.config.logits)
        source.accompany(which, directory, "onnx")

    def open(self, source: Source, which: Which, directory: Path) -> Runner:
        return onnx.open_runner(directory)


class Openvino(_Graph):
    """Compared in float32, run at the precision that the device chooses."""

    runtime = "openvino"

    def write(self, source: Source, which: Which, directory: Path) -> None:
        try:
            graph = source.folder("onnx", which)
        except ExportError as error:
            raise ExportError(f"openvino, by way of {error}") from error
        openvino.write(onnx.graph_in(graph), directory)
        source.accompany(which, directory, "openvino")

    def open(self, source: Source, which: Which, directory: Path) -> Runner:
        return openvino.open_runner(directory, precision=None)

    def exact(self, source: Source, directory: Path, runner: Runner) -> Runner:
        return openvino.open_runner(directory)

    def precision(self, source: Source, runner: Any) -> str:
        return str(runner.precision)


class Gguf(Format):
    """For llama.cpp, in half precision; nothing here runs it, so what was written is read back."""

    def require(self) -> None:
        gguf.require()

    def why_not(self, source: Source) -> str | None:
        model = source.models["compact"]
        reason = text_only.why_not(model)
        return reason or gguf.why_not(as_text(model), source.base.tokenizer)

    def write(self, source: Source, which: Which, directory: Path) -> None:
        model = as_text(source.models[which])
        file = gguf.write(model, source.base.tokenizer, directory, name=source.name)
        gguf.check(file, model)

    def about(self, source: Source, directory: Path) -> dict[str, Any]:
        return text_only.about(source.models["compact"])


class NemotronNas(Format):
    """In the layout of NVIDIA's Puzzle models. Nothing here runs their classes: what was written is
    read back by the layout's rule, and compared as a Llama of the sizes that it says."""

    def why_not(self, source: Source) -> str | None:
        model = source.models["compact"]
        return text_only.why_not(model) or nemotron_nas.why_not(as_text(model))

    def write(self, source: Source, which: Which, directory: Path) -> None:
        model = as_text(source.models[which])
        nemotron_nas.write(
            model, source.base.tokenizer, directory, dtype=_stored(source),
            max_shard_size=source.config.hf.max_shard_size,
        )  # fmt: skip
        nemotron_nas.check(directory, model)

    def about(self, source: Source, directory: Path) -> dict[str, Any]:
        model = as_text(source.models["compact"])
        filled = dataclasses.asdict(nemotron_nas.padding(model))
        return {
            "padding": filled,
            "pipelines": nemotron_nas.cannot(model),
            **text_only.about(source.models["compact"]),
        }


FORMATS: dict[str, Format] = {
    "hf": Hf(),
    "peft": Peft(),
    "onnx": Onnx(),
    "openvino": Openvino(),
    "gguf": Gguf(),
    "nemotron_nas": NemotronNas(),
    "elastic": Elastic(),
}


FORMATS |= {
    f"{kind}-{mode}": Compressed(kind, FORMATS[kind], mode) for kind in GRAPHS for mode in MODES
}
