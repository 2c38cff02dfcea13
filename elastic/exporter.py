"""From one sub-adapter to files on disk that were loaded again and compared before we say so."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from elastic import foreign, models
from elastic.adapters.attach import dequantise_
from elastic.batching import encode_text, prompt_ids
from elastic.classifier import classes_of
from elastic.config import ExportConfig, ModelConfig
from elastic.cost import Counter, count
from elastic.errors import ExportError, RunError
from elastic.evaluate import evaluate
from elastic.files import new_directory, read_json, write_json
from elastic.formats import hf, onnx, openvino, peft
from elastic.latency import REFERENCE, Measurement, clock_of, measure
from elastic.merging import combine, compact
from elastic.progress import say
from elastic.provenance import provenance
from elastic.report import Report
from elastic.run import Run, as_plain
from elastic.runners import Runner, runner_of, timed_runner, timing_of
from elastic.space import SubAdapter
from elastic.supernet import ABOUT, Supernet
from elastic.tasks import Example, load_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEW_TOKENS = 8
"""Greedy tokens compared per probe prompt."""
CANDIDATE = "compact"


@dataclass(frozen=True)
class Probe:
    """What the supernet computes for one prompt with the sub-adapter active."""

    prompt: np.ndarray
    """(1, prompt) int64."""
    tokens: np.ndarray
    """(1, NEW_TOKENS) its greedy continuation, or (1, 1) its class."""
    logits: np.ndarray
    """(NEW_TOKENS, vocab) behind each of those tokens, or (1, classes)."""


@dataclass(frozen=True)
class Agreement:
    """How far a written model is from the supernet over all probes."""

    max_abs_diff: float
    largest_logit: float
    greedy_tokens_equal: bool
    decided: bool
    """Whether a differing token was no mere tie: the two candidates were further apart than
    rounding explains."""


def export(config: ExportConfig) -> Report:
    """Write RUN/export/NAME in every format asked for, each checked against the supernet.

    All formats are written beside the target and take its place together, only after each was
    loaded in its own runtime and agreed; an earlier export of the same name stays otherwise.
    ExportError names the format and the largest difference.
    """
    run = Run(config.run)
    trained = run.config()
    for name in config.formats:
        if name in ("onnx", "openvino"):
            onnx.require()
        if name == "openvino":
            openvino.require()
    config = dataclasses.replace(config, timing=timing_of(config.timing, trained.model))
    # The base itself is hashed, and held against this, when the run is loaded.
    digest = read_json(run.super_adapter / ABOUT)["base_digest"]
    others = [foreign.identify(entry.path, digest) for entry in config.merge.adapters]
    task = load_task(trained.task, trained.seed)
    # Written models are float32 unless the run was float64: parity is shown at that precision.
    dtype = "float64" if trained.model.dtype == "float64" else "float32"
    wanted = dataclasses.replace(trained.model, dtype=dtype)
    _, base, net = run.load(dtype=dtype)
    name, sub = run.resolve(config.sub_adapter, net.space, config.seed)
    name = f"{name}-merged" if others else name
    directory = run.path / "export" / (config.name or name)
    if directory.exists() and not (directory / "report.json").is_file():
        raise RunError(f"{directory} exists and is no export; choose another --name")

    inputs = [_ids(base, example) for example in task.test[:4]]
    if others:
        updates = [foreign.read(folder, wanted, digest) for folder in others]
        merged = combine(net, sub, updates, config.merge, name=name, seed=config.seed)
        model, extra = merged.model, {"merge": merged.report}
        probes = [probe(model, ids) for ids in inputs]
    else:
        model, extra = compact(net, sub), {}
        with net.active(sub) as active:
            probes = [probe(active, ids) for ids in inputs]
    full = compact(net, net.space.maximal())
    work = _Work(config, net, sub, model, full, base, probes, wanted)
    writers: dict[str, Callable[[Path], dict[str, Any]]] = {
        "hf": work.hf, "peft": work.peft, "onnx": work.onnx, "openvino": work.openvino
    }  # fmt: skip
    found = {}
    with new_directory(directory) as building, tempfile.TemporaryDirectory() as scratch:
        work.scratch = Path(scratch)
        for kind in dict.fromkeys(config.formats):
            say(f"Writing and checking {kind}")
            found[kind] = writers[kind](building / kind)
            if (building / kind).is_dir():
                # The final place: the directory is renamed when everything is done.
                found[kind] = {"path": str(directory / kind), **found[kind]}
        contents = {
            "name": name,
            "sub_adapter": sub.as_dict(),
            **extra,
            **_accuracy(run, config, name, sub, model, base.tokenizer, task.test),
            **_costs(net, sub, model),
            "timing": as_plain(config.timing),
            "formats": found,
            "base_model": trained.model.path,
            "base_digest": base.digest,
            "seed": config.seed,
            **provenance(str(model.device)),
        }
        write_json(building / "report.json", contents)
    return Report(directory, contents, tuple(dict.fromkeys(work.warnings)))


class _Work:
    """One method per format: write into a folder, load, compare, time, describe."""

    scratch: Path

    def __init__(self, config, net, sub, model, full, base, probes, trained) -> None:
        self.config: ExportConfig = config
        self.net: Supernet = net
        self.sub: SubAdapter = sub
        self.model: PreTrainedModel = model
        self.full: PreTrainedModel = full
        self.base: models.Base = base
        self.probes: list[Probe] = probes
        self.trained: ModelConfig = trained
        self.warnings: list[str] = []
        self._graphs: dict[str, Path] = {}

    def hf(self, directory: Path) -> dict[str, Any]:
        # In the type the base model was saved in; reloading is bit for bit at that type.
        stored = models.stored_dtype(self.trained) or self.model.dtype
        if self.model.dtype == torch.float64:
            stored = torch.float64
        hf.write(self.model, self.base.tokenizer, directory, dtype=stored)
        loaded = hf.load(directory, stored)
        for name, tensor in self.model.state_dict().items():
            if not torch.equal(loaded.state_dict()[name], tensor.to(stored).cpu()):
                raise ExportError(f"hf: {name} is not the same bit for bit after reloading")
        runner = runner_of(loaded.to(self.model.device))
        # Rounding to a narrower stored type is the user's choice of base, not a fault.
        limit = 1e-4 if stored == torch.float32 else 1e-9 if stored == torch.float64 else None
        timing = self._time_torch(runner.model)
        return self._described(directory, self._agreement("hf", runner, limit), timing)

    def peft(self, directory: Path) -> dict[str, Any]:
        if self.config.merge.adapters:
            reason = "merged with other adapters, whose sum need not have a low rank"
            return {"skipped": reason}
        if reason := peft.why_not(self.net, self.sub):
            return {"skipped": reason}
        from peft import PeftModel

        peft.write(
            self.net, self.sub, directory,
            base_model=self.trained.path, base_digest=self.base.digest,
        )  # fmt: skip
        # Dense like the full model it is timed against.
        plain = dequantise_(models.load_model(models.locate(self.trained.path), self.trained))
        adapted = PeftModel.from_pretrained(plain, str(directory)).eval()
        runner = runner_of(adapted.get_base_model())
        limit = 1e-9 if self.model.dtype == torch.float64 else 1e-4
        timing = self._time_torch(runner.model)
        rank = read_json(directory / foreign.PEFT_CONFIG)["r"]
        return {
            "rank": rank,
            **self._described(directory, self._agreement("peft", runner, limit), timing),
        }

    def onnx(self, directory: Path) -> dict[str, Any]:
        if reason := models.no_graph(self.model.config):
            return {"skipped": reason}
        graph = onnx.write(_float32(self.model), directory, logits=self.config.logits)
        self._graphs["onnx"] = graph
        self._companions(directory)
        runner = onnx.OnnxRunner(graph)
        agreement = self._agreement("onnx", runner, 2e-4)
        reference = onnx.OnnxRunner(self._full_graph())
        return self._described(
            directory, agreement, self._time({REFERENCE: reference, CANDIDATE: runner})
        )

    def openvino(self, directory: Path) -> dict[str, Any]:
        if reason := models.no_graph(self.model.config):
            return {"skipped": reason}
        graph = self._graphs.get("onnx")
        if graph is None:
            graph = onnx.write(
                _float32(self.model), self.scratch / "compact", logits=self.config.logits
            )
        written = openvino.write(graph, directory)
        self._companions(directory)
        agreement = self._agreement("openvino", openvino.OpenVINORunner(written), 2e-4)
        # Parity is shown at float32; latency at the precision the device runs it in.
        full = openvino.write(self._full_graph(), self.scratch / "full-openvino")
        timing = self._time(
            {
                REFERENCE: openvino.OpenVINORunner(full, precision=None),
                CANDIDATE: openvino.OpenVINORunner(written, precision=None),
            }
        )
        return self._described(directory, agreement, timing)

    def _full_graph(self) -> Path:
        if "full" not in self._graphs:
            self._graphs["full"] = onnx.write(
                _float32(self.full), self.scratch / "full", logits=self.config.logits
            )
        return self._graphs["full"]

    def _companions(self, directory: Path) -> None:
        """Config and tokenizer beside a graph, so that its folder is all a server needs."""
        hf.described_config(self.model, code=False).save_pretrained(directory)
        if (generation := getattr(self.model, "generation_config", None)) is not None:
            generation.save_pretrained(directory)
        self.base.tokenizer.save_pretrained(directory)

    def _agreement(self, kind: str, runner: Runner, limit: float | None) -> Agreement:
        """ExportError when the difference exceeds `limit` times the largest logit, or a greedy
        token differs that was no tie."""
        found = agreement(runner, self.probes)
        if np.isnan(found.max_abs_diff):
            raise ExportError(f"{kind}: its logits are not numbers (NaN); nothing was kept")
        allowed = None if limit is None else limit * found.largest_logit
        if allowed is not None and not found.max_abs_diff <= allowed:
            raise ExportError(
                f"{kind}: logits differ from the supernet by up to {found.max_abs_diff:.3g}, more "
                f"than the {allowed:.3g} that rounding explains; nothing was kept"
            )
        if allowed is not None and found.decided:
            raise ExportError(
                f"{kind}: greedy tokens differ from the supernet's although logits agree to "
                f"{found.max_abs_diff:.3g}; nothing was kept"
            )
        return found

    def _time_torch(self, model: PreTrainedModel) -> Measurement:
        runners = {
            name: timed_runner(each, self.config.timing)
            for name, each in ((REFERENCE, self.full), (CANDIDATE, model))
        }
        return self._time(runners, str(self.model.device))

    def _time(self, runners: Mapping[str, Runner], device: str = "cpu") -> Measurement:
        found = measure(
            runners,
            self.config.timing,
            vocabulary=self.model.config.vocab_size,
            seed=self.config.seed,
            clock=clock_of(torch.device(device)),
        )
        if warning := found.warning():
            self.warnings.append(f"Latency: {warning}")
        return found

    def _described(
        self, directory: Path, agreement: Agreement, timing: Measurement
    ) -> dict[str, Any]:
        own, full = timing.latencies[CANDIDATE], timing.full
        return {
            "bytes": sum(f.stat().st_size for f in directory.rglob("*") if f.is_file()),
            "max_abs_diff": agreement.max_abs_diff,
            "largest_logit": agreement.largest_logit,
            "greedy_tokens_equal": agreement.greedy_tokens_equal,
            "prefill_ms": own.prefill_ms,
            "decode_ms": own.decode_ms,
            "full_prefill_ms": full.prefill_ms,
            "full_decode_ms": full.decode_ms,
            "control": timing.control,
            "trusted": timing.trusted,
        }


def _float32(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a copy when it is wider."""
    return model if model.dtype == torch.float32 else copy.deepcopy(model).float()


def _ids(base: models.Base, example: Example) -> np.ndarray:
    """(1, length) int64."""
    if classes_of(base.model):
        ids = encode_text(base.tokenizer, base.model, example).ids
    else:
        ids = prompt_ids(base.tokenizer, example)
    return np.array([ids], dtype=np.int64)


def probe(model: PreTrainedModel, prompt: np.ndarray) -> Probe:
    """A classifier's has one token: the class."""
    runner = runner_of(model)
    logits = [runner.prefill(prompt)]
    tokens = [logits[0].argmax(-1)]
    for _ in range(0 if classes_of(model) else NEW_TOKENS - 1):
        logits.append(runner.decode(tokens[-1][:, None]))
        tokens.append(logits[-1].argmax(-1))
    return Probe(prompt, np.stack(tokens, axis=1), np.concatenate(logits))


def agreement(runner: Runner, probes: Sequence[Probe]) -> Agreement:
    """Feed every probe's prompt and greedy tokens to `runner`, compare logits and choices."""
    difference = largest = 0.0
    equal, decided = True, False
    for probe in probes:
        for step, expected in enumerate(probe.logits):
            if step == 0:
                found = runner.prefill(probe.prompt)[0]
            else:
                found = runner.decode(probe.tokens[:, step - 1 : step])[0]
            gap = float(np.abs(found - expected).max())
            # NaN compares false with everything; it must not pass as a small difference.
            difference = float("nan") if np.isnan(gap) else max(difference, gap)
            largest = max(largest, float(np.abs(expected).max()))
            mine, theirs = int(found.argmax()), int(probe.tokens[0, step])
            if mine != theirs:
                equal = False
                decided = decided or expected[theirs] - expected[mine] > 2 * gap
            if np.isnan(difference):
                return Agreement(difference, largest, False, True)
    return Agreement(difference, largest, equal, decided)


def _accuracy(
    run: Run, config: ExportConfig, name: str, sub: SubAdapter, model, tokenizer, test
) -> dict[str, Any]:
    """Test accuracy: the search's if it scored this sub-adapter, else measured now."""
    file = run.sub_adapters / f"{name}.json"
    if file.is_file():
        found = read_json(file)
        if found.get("sub_adapter") == sub.as_dict():
            return {key: found[key] for key in ("accuracy", "accuracy_n", "accuracy_interval")}
    if not config.accuracy:
        return dict.fromkeys(("accuracy", "accuracy_n", "accuracy_interval"))
    return evaluate(
        model, tokenizer, test, batch_tokens=config.batch_tokens, label="scoring"
    ).as_dict()


def _costs(net: Supernet, sub: SubAdapter, model: PreTrainedModel) -> dict[str, int]:
    cost, full = count(model), Counter(net.model, net.space).full
    return {
        "params": cost.params, "macs": cost.macs,
        "full_params": full.params, "full_macs": full.macs,
    }  # fmt: skip
