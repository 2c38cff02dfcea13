"""What is timed and where: the target that a latency table is for."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from elastic.config import TimingConfig
from elastic.formats.graphs import PACKAGES
from elastic.models import loading
from elastic.provenance import provenance
from elastic.run import Run
from elastic.spaces.declared import SearchSpace
from elastic.spaces.dims import DEPTH
from elastic.supernet.store import ORDER, read_factors, read_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LATENCIES = ("prefill_ms", "decode_ms")


@dataclass(frozen=True)
class Target:
    """What a latency is the latency of."""

    model: str
    """The architecture and the space, whatever the weights."""
    device: str
    runtime: str
    dtype: str
    merged: bool
    batch: int
    prompt_tokens: int
    new_tokens: int
    compress: str | None = None
    """How weights are compressed."""

    @classmethod
    def of(cls, run: Run, timing: TimingConfig, compress: str | None = None) -> Target:
        """Here, of this run's sub-adapters; reads no weights."""
        trained = run.config()
        architecture, space = loading.architecture_of(trained.model), run.space()
        sizes = sizes_of(architecture, space, trained.adapter.rank)
        sizes["factors"] = None if timing.merged else _factors(run)
        if blocks := _depths(run):
            sizes["blocks"] = blocks
        device, dtype = "cpu", "float32"  # where and how the other runtimes run
        if timing.runtime == "torch":
            here = loading.resolve_device(trained.model.device)
            device = str(here)
            dtype = str(loading.resolve_dtype(trained.model.dtype, here)).removeprefix("torch.")
        return cls.described(sizes, device, dtype, timing, compress)

    @classmethod
    def described(
        cls,
        sizes: Mapping[str, Any],
        device: str,
        dtype: str,
        timing: TimingConfig,
        compress: str | None = None,
    ) -> Target:
        """Of sub-adapters of these `sizes_of` a model, in this type on this device of torch's."""
        text = json.dumps(sizes, sort_keys=True, default=str)
        return cls(
            hashlib.sha256(text.encode()).hexdigest(),
            describe_device(device, timing.runtime),
            timing.runtime,
            dtype,
            timing.merged,
            timing.batch,
            timing.prompt_tokens,
            timing.new_tokens,
            compress,
        )

    @property
    def digest(self) -> str:
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def sizes_of(architecture: PretrainedConfig, space: SearchSpace, rank: int) -> dict[str, Any]:
    """What makes a difference to the speed of merged sub-adapters of a model."""
    words = architecture.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        words.pop(name, None)
    return {"architecture": words, "space": space.as_dict(), "rank": rank, "factors": None}


def describe_device(device: str, runtime: str) -> str:
    """The hardware, how much of it is used, and the runtime's version."""
    about = provenance(device)
    if runtime == "torch":
        version = about["versions"].get("torch")
    else:
        version = importlib.import_module(PACKAGES[runtime]).__version__
    return f"{about['device']}, {runtime} {version}"


def _depths(run: Run) -> dict[str, list[int]]:
    """In which order blocks are left out, by group."""
    names = [
        f"{section.blocks}.{spec.name}"
        for section in run.space().sections
        for spec in section.groups
        if spec.dim == DEPTH
    ]
    if not names:
        return {}
    order = read_tensors(run.super_adapter / ORDER)
    return {name: order[name].tolist() for name in names if name in order}


def _factors(run: Run) -> dict[str, list[int]]:
    """Shapes of what runs beside the weights."""
    factors = read_factors(run.super_adapter)
    return {name: list(factors[name].shape) for name in sorted(factors)}
