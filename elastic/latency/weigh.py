"""What a written model takes to run: seconds to load, and memory once it has answered a prompt.

    python -m elastic.latency.weigh '{"runtime": "onnx", "folder": "...", ...}' ...

Each model is loaded in a process of its own, forked from one that has imported the runtime and
nothing else, so that neither a library's memory nor that of the model before counts.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from elastic.console import busy
from elastic.errors import RunError

if TYPE_CHECKING:
    from elastic.formats.runner import Runner


@dataclass(frozen=True, kw_only=True)
class Load:
    """A model to weigh: who runs it, from where, and the prompts it gets."""

    runtime: str
    folder: str
    batch: int = 1
    prompt_tokens: int = 64
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the runtime: `dtype` and `device` of hf, `model` (a ModelConfig) of peft."""


@dataclass(frozen=True)
class Weight:
    """What a model costs to load."""

    load_s: float
    """Seconds from files, which the system may hold in memory already, to a model ready to run."""
    memory_mb: float
    """By how much loading and one prefill let the process grow, cache included, in 1e6 bytes: its
    own memory and what of the folder it has mapped; on a GPU, the most that torch allocated."""


def weigh(loads: Sequence[Load]) -> list[Weight]:
    """Models of one runtime, one after another; RunError with what the process said last."""
    home = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "elastic.latency.weigh"]
    with busy("loading each in a process of its own"):
        done = subprocess.run(
            [*command, *(json.dumps(asdict(load)) for load in loads)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RunError(f"{loads[0].runtime}: memory and load time could not be measured: {reason}")
    return [Weight(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def _hf(load: Load) -> Callable[[], Runner]:
    import torch
    import transformers

    from elastic.formats import hf
    from elastic.formats.runner import runner_of

    config = json.loads((Path(load.folder) / "config.json").read_text(encoding="utf-8"))
    getattr(transformers, config["architectures"][0].removeprefix("Elastic"), None)
    dtype = getattr(torch, load.settings["dtype"])
    device = load.settings["device"]
    trusted = load.settings.get("trust_remote_code", False)
    return lambda: runner_of(hf.load(Path(load.folder), dtype, trusted).to(device))


def _elastic(load: Load) -> Callable[[], Runner]:
    from elastic.formats import slices
    from elastic.formats.runner import runner_of

    name, device = load.settings["slice"], load.settings["device"]
    return lambda: runner_of(slices.load(load.folder, name).to(device))


def _peft(load: Load) -> Callable[[], Runner]:
    import transformers
    from peft import PeftModel

    from elastic.config import ModelConfig
    from elastic.formats.runner import runner_of
    from elastic.models import loading

    config = ModelConfig(**load.settings["model"])
    getattr(transformers, (loading.architecture_of(config).architectures or [""])[0], None)

    def opened() -> Runner:
        plain = loading.load_model(loading.locate(config.path), config)
        return runner_of(PeftModel.from_pretrained(plain, load.folder).eval().get_base_model())

    return opened


def _onnx(load: Load) -> Callable[[], Runner]:
    import onnxruntime  # noqa: F401

    from elastic.formats import onnx

    return lambda: onnx.open_runner(Path(load.folder))


def _openvino(load: Load) -> Callable[[], Runner]:
    import openvino as runtime

    from elastic.formats import openvino

    runtime.Core().get_property("CPU", "FULL_DEVICE_NAME")  # lets the plugin be loaded
    return lambda: openvino.open_runner(Path(load.folder), precision=None)


TRANSFORMERS = ("elastic.formats.hf", "transformers.models.auto.modeling_auto")
LOADERS: dict[str, tuple[Callable[[Load], Callable[[], Runner]], tuple[str, ...]]] = {
    "hf": (_hf, TRANSFORMERS),
    "peft": (_peft, (*TRANSFORMERS, "peft")),
    "elastic": (_elastic, ("elastic.formats.slices", *TRANSFORMERS)),
    "onnx": (_onnx, ("elastic.formats.onnx", "onnxruntime")),
    "openvino": (_openvino, ("elastic.formats.openvino", "openvino")),
}
"""By runtime: what prepares it and returns what loads the model into it; and what takes long to
import, which is done once for all models."""


def _weighed(load: Load) -> Weight:
    opened = LOADERS[load.runtime][0](load)
    cuda = str(load.settings.get("device", "")).startswith("cuda")
    before = _resident(load.folder)
    start = time.perf_counter()
    runner = opened()
    seconds = time.perf_counter() - start
    runner.prefill(np.zeros((load.batch, load.prompt_tokens), np.int64))
    if cuda:
        import torch

        return Weight(seconds, torch.cuda.max_memory_allocated(load.settings["device"]) / 1e6)
    return Weight(seconds, (_resident(load.folder) - before) / 1e6)


def _resident(folder: str) -> int:
    """Bytes that this process holds: its own, and mapped files of the folder. The code of libraries
    is left out where the system tells it apart."""
    info = psutil.Process().memory_info()
    if not hasattr(info, "shared"):
        return int(info.rss)
    maps = psutil.Process().memory_maps()
    inside = str(Path(folder).resolve()) + os.sep
    mapped = sum(each.rss for each in maps if each.path.startswith(inside))
    return int(info.rss - info.shared + mapped)


def main(arguments: Sequence[str]) -> None:
    """In the process of one runtime: each model in a child of its own, figures printed as JSON."""
    loads = [Load(**json.loads(argument)) for argument in arguments]
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    for name in {name: None for load in loads for name in LOADERS[load.runtime][1]}:
        importlib.import_module(name)
    found = []
    for load in loads:
        with ProcessPoolExecutor(1, mp_context=context) as process:
            found.append(asdict(process.submit(_weighed, load).result()))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
