"""Folders that transformers and PEFT load."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from elastic.data.task import Example
from elastic.errors import ExportError
from elastic.evaluation.evaluate import evaluate
from elastic.evaluation.statistics import Score
from elastic.files import read_json
from elastic.formats import hf, peft
from elastic.formats.padding import padded
from elastic.formats.runner import Runner, runner_of
from elastic.latency.runtime import timed_runner
from elastic.latency.weigh import Load
from elastic.models import loading
from elastic.models.modules import dequantise_
from elastic.run import as_plain
from elastic.writers.base import Format, Source, Which

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

    def why_not(self, source: Source) -> str | None:
        return None if source.config.hf.padded else hf.why_not(source.models["compact"])

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
        folder = loading.locate(source.trained.path)
        plain = dequantise_(loading.load_model(folder, source.trained))
        adapted = PeftModel.from_pretrained(plain, str(directory)).eval()
        return runner_of(adapted.get_base_model())

    def full(self, source: Source, kind: str) -> Runner:
        return runner_of(source.models["full"])

    def loads(self, source: Source, kind: str, directory: Path) -> tuple[Load, Load]:
        _, full = source.formats["hf"].loads(source, "hf", directory)
        dtype = source.trained.dtype
        settings = {**full.settings, "dtype": dtype}
        own = self._load(
            source, directory, device=self.device(source),
            model=as_plain(dataclasses.replace(source.trained, quantise="none")),
        )  # fmt: skip
        return own, dataclasses.replace(full, settings=settings)

    def about(self, source: Source, directory: Path) -> dict[str, Any]:
        return {"rank": read_json(directory / peft.PEFT_CONFIG)["r"]}


def _stored(source: Source) -> torch.dtype:
    """The type that Hugging Face folders are written in."""
    dtype = source.models["compact"].dtype
    return dtype if dtype == torch.float64 else loading.stored_dtype(source.trained) or dtype
