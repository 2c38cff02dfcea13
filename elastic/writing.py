"""An export that only writes: for models larger than memory.

Nothing is loaded again, compared or timed, so the report says that it proves nothing; the weights
are those that a proved export writes, to the byte.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from elastic.config import ExportConfig
from elastic.console import say
from elastic.errors import ExportError, require
from elastic.files import new_directory, write_json, write_text
from elastic.formats import card, hf
from elastic.models import loading
from elastic.models.digest import digest_of
from elastic.proof import NO_SCORE, size_of
from elastic.provenance import provenance
from elastic.report import Report, verdict
from elastic.run import Run, as_plain
from elastic.supernet.compact import streamed
from elastic.supernet.cost import Counter, count
from elastic.supernet.store import load_super_adapter, read_factors, read_super_adapter

UNPROVED = "neither loaded again nor compared: prove false"


def write_only(config: ExportConfig) -> Report:
    """Write RUN/export/NAME/hf, at most `hf.max_shard_size` of it in memory at a time.

    The base is read in the type it was saved in, so that its file is mapped, not copied; sums of
    weights and updates are formed in float32 and rounded once.
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
    stored = dataclasses.replace(trained.model, dtype=str(dtype).removeprefix("torch."))
    skeleton = loading.skeleton(trained.model, dtype)
    full = count(skeleton)
    net = load_super_adapter(skeleton, digest, run.super_adapter)
    name, sub = run.resolve(config.sub_adapter, net.space, config.seed)
    directory = run.export(config.name or name, sub, ["hf"])
    base = loading.load_model(folder, dataclasses.replace(stored, device="cpu"))
    net.model.config.pad_token_id = base.config.pad_token_id
    if base.can_generate():
        net.model.generation_config = base.generation_config
    factors = read_factors(run.super_adapter)
    found = streamed(base, net, sub, {key: factors[key] for key in net.head})
    if reason := hf.why_not(found.model):
        raise ExportError(f"hf: {reason}")
    with new_directory(directory) as building:
        say("Writing hf")
        hf.write(
            found.model, loading.load_tokenizer(trained.model), building / "hf", dtype=dtype,
            max_shard_size=config.hf.max_shard_size, tensors=found.tensors,
        )  # fmt: skip
        cost = count(found.model)
        written = {"path": str(directory / "hf"), "unproved": UNPROVED, "bytes": 0}
        contents = {
            "verdict": verdict({"hf": written}),
            "name": name,
            "sub_adapter": sub.as_dict(),
            **NO_SCORE,
            "params": cost.params, "macs": cost.macs,
            "full_params": full.params, "full_macs": Counter(net.model, net.space).full.macs,
            "timing": as_plain(config.timing),
            "formats": {"hf": written},
            "samples": [],
            **run.origin(),
            "license": card.license_of(Path(folder)),
            "base_digest": digest,
            "seed": config.seed,
            **provenance("cpu"),
        }  # fmt: skip
        card.write(contents, building / "hf")
        written["bytes"] = size_of(building / "hf")
        report = Report(directory, contents)
        write_json(building / "report.json", contents)
        write_text(building / "report.md", report.markdown())
    return report
