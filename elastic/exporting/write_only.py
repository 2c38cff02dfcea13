"""Writing what is larger than memory, a shard at a time: neither loaded again nor compared."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from elastic.console import say
from elastic.errors import ExportError, require
from elastic.exporting.described import described
from elastic.exporting.every_size import EverySize
from elastic.exporting.proof import Accuracy, Unproved, size_of
from elastic.exporting.report import Model, Report
from elastic.exporting.targets import NO_MIXTURES
from elastic.files import new_directory
from elastic.formats import hf, shards, slices
from elastic.models import loading
from elastic.models.digest import digest_of
from elastic.provenance import provenance
from elastic.run import Chosen, Run
from elastic.spaces.bound import SubAdapter
from elastic.supernet.compensation import HALF, Compensation
from elastic.supernet.cost import Counter, count
from elastic.supernet.examples import task_of
from elastic.supernet.held_out import Compensated, fitted_batches
from elastic.supernet.sequential import fit_streamed_
from elastic.supernet.store import load_super_adapter, read_factors, read_super_adapter
from elastic.supernet.streaming import Streamed, streamed, take_settings_

if TYPE_CHECKING:
    from elastic.config import ExportConfig
    from elastic.supernet.supernet import Supernet


def _without_asking(
    chosen: Chosen, net: Supernet, sub: SubAdapter, config: ExportConfig
) -> Compensated:
    """What the search chose, or the one degree that was set: held-out examples cannot be asked of a
    model that is not in memory."""
    degrees = set(config.compensation.degrees)
    cuts = net.compensation is not None and net.cuts(sub)
    if not (cuts or net.drops_experts(sub)) or degrees == {0.0}:
        return Compensated()
    if net.compensation is not None:
        net.compensation = Compensation(
            net.compensation.moments, config.compensation.ridge, config.compensation.room_mb * 1e6
        )
    if chosen.compensation is not None:
        return Compensated.of(chosen.compensation)
    if not cuts:  # of experts that are gone, only a fit says something
        return Compensated()
    if len(degrees) > 1:
        say("prove false: nobody is asked how much of what is cut to make up for: half of it")
    return Compensated(degrees.pop() if len(degrees) == 1 else HALF)


UNPROVED = "neither loaded again nor compared: prove false"


def write_only(config: ExportConfig) -> Report:
    """Write RUN/export/NAME/hf, at most `hf.max_shard_size` of it in memory at a time, and elastic,
    where beside that what one slice has of its own is in memory.

    The base is read in the type it was saved in, so that its file is mapped, not copied; sums of
    weights and updates are formed in float32 and rounded once.

    ConfigError for a base that is merged in another type than it is stored in, ExportError for a
    model that no Hugging Face class describes.
    """
    run = Run(config.run)
    trained = run.config()
    folder = loading.locate(trained.model.path)
    digest = digest_of(folder)
    read_super_adapter(run.super_adapter, digest)
    require(
        trained.model.quantise == "none" and trained.model.dtype != "float64",
        f"prove false: {run.path} was trained with quantised or float64 weights, which are merged "
        "in another type than they are stored in; leave it out",
    )
    dtype = loading.stored_dtype(trained.model) or torch.float32
    as_stored: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "device": "cpu"}
    skeleton = loading.skeleton(trained.model, dtype)
    chosen = run.chosen(config.sub_adapter)
    if joined := shards.joined_bytes(skeleton):
        say(
            f"{trained.model.path} has every expert on its own on disk; joined, {joined / 1e9:.1f} "
            "GB of them are in memory"
        )
    net = load_super_adapter(skeleton, digest, run.super_adapter)
    require(
        not net.head or "elastic" not in config.kinds,
        "prove false: a classifier is written as hf alone; leave elastic or prove false out",
    )
    require(
        not net.mixtures or "elastic" not in config.kinds,
        f"elastic: {NO_MIXTURES}; leave it out",
    )
    factors = read_factors(run.factors_of(chosen))
    net.load_factors(factors)
    full_cost = Counter(net.model, net.space).full
    name, sub = chosen.name, chosen.at(net.space, config.seed)
    directory = run.export(config.name or name, sub, config.kinds)
    base = loading.load_model(folder, dataclasses.replace(trained.model, **as_stored))
    take_settings_(net.model, base)
    stream = functools.partial(streamed, base, net, head={key: factors[key] for key in net.head})
    tokenizer = loading.load_tokenizer(trained.model)

    @functools.cache
    def batches() -> list[dict[str, torch.Tensor]]:
        return fitted_batches(trained, base, tokenizer, task_of(run), config.compensation)

    def best(chosen: Chosen, sub: SubAdapter) -> tuple[Compensated, Streamed]:
        """With the factors that the net has now; what was fitted is kept in `changes`."""
        made_up = _without_asking(chosen, net, sub, config)
        found = stream(sub, degree=made_up.degree)
        if made_up.sequential:
            own = Path(tempfile.mkdtemp(dir=changes))
            fit_streamed_(found, stream(net.space.maximal()), net, sub, batches(), own)
        return made_up, found

    with (
        new_directory(directory) as building,
        tempfile.TemporaryDirectory(dir=building, prefix=".") as changes,
    ):
        made_up, found = best(chosen, sub)
        shard: dict[str, Any] = {"max_shard_size": config.hf.max_shard_size}
        if "hf" in config.kinds:
            if reason := hf.why_not(found.model):
                raise ExportError(f"hf: {reason}")
            say("Writing hf")
            hf.write(
                found.model, tokenizer, building / "hf", dtype=dtype, tensors=found.tensors, **shard
            )
        if "elastic" in config.kinds:
            say("Writing elastic")
            every = EverySize(run, net, best, chosen, config.seed, config.slices.tables)
            with every.factors_of(None):
                slices.write(
                    net, tokenizer, every.slices(), building / "elastic", model=trained.model,
                    dtype=dtype, latencies=every.latencies(), stream=stream,
                    referred=digest if config.slices.base == "reference" else None, **shard,
                )  # fmt: skip
        sizes = {kind: size_of(building / kind) for kind in config.kinds}
        return described(
            building, run, config,
            directory=directory,
            base_digest=digest,
            model=Model(name, sub, Accuracy(), count(found.model), full_cost, made_up),
            formats={kind: Unproved(size, UNPROVED) for kind, size in sizes.items()},
            provenance=provenance("cpu"),
        )  # fmt: skip
