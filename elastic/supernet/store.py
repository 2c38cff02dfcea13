"""The directory a super-adapter is kept in: written, read, and loaded over its base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from elastic.config import AdapterConfig, ModelConfig, TrainConfig
from elastic.config.model import Dtype
from elastic.config.parsing import from_dict
from elastic.console import busy
from elastic.errors import BaseMismatch, RunError
from elastic.files import new_directory, read_json, same_file, write_json, write_text
from elastic.models import loading
from elastic.models.digest import digest_of
from elastic.plain import one_line, read_yaml, shaped
from elastic.provenance import provenance
from elastic.run import Chosen, Run
from elastic.spaces.bound import BoundSpace, all_digits
from elastic.spaces.declared import SearchSpace
from elastic.spaces.dims import places
from elastic.supernet.as_lora import AsLora
from elastic.supernet.compensation import Compensation
from elastic.supernet.examples import require_tokenizer
from elastic.supernet.importance import blank
from elastic.supernet.moments import Moments, save
from elastic.supernet.routed import widths_of
from elastic.supernet.supernet import Supernet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FACTORS, ORDER, SPACE, ABOUT = (
    "factors.safetensors",
    "order.safetensors",
    "space.yaml",
    "about.json",
)
MOMENTS = "moments.safetensors"
"""What those of earlier versions lack."""
LARGEST = 1e18
"""Of a factor; the product of two that are larger is no float32."""


def save_super_adapter(
    net: Supernet,
    directory: Path,
    *,
    model: ModelConfig,
    base_digest: str,
    factors: Mapping[str, Tensor] | None = None,
    moments: Mapping[str, Tensor] | None = None,
    plain: AsLora | None = None,
    **about: Any,
) -> None:
    """Write factors (the supernet's unless given), channel order, space, moments where known, and
    provenance, all at once or not at all; as plain LoRA if it is given so."""
    with new_directory(directory) as building:
        said = plain or net
        if factors is None:
            factors = plain.factors if plain else net.factor_state()
        save_file({k: v.cpu().contiguous() for k, v in factors.items()}, building / FACTORS)
        save_file({k: v.contiguous() for k, v in net.order.items()}, building / ORDER)
        if isinstance(moments, Moments):
            same_file(moments.file, building / MOMENTS)
        elif moments:
            save(moments, building / MOMENTS)
        write_text(building / SPACE, yaml.safe_dump(said.declared.as_dict(), sort_keys=False))
        write_json(
            building / ABOUT,
            {
                "base_model": model.path,
                "quantise": model.quantise,
                "base_digest": base_digest,
                "adapter": dataclasses.asdict(said.adapter),
                "sub_adapters": all_digits(net.space.size),
                **provenance(str(net.device)),
                **about,
            },
        )


def load_super_adapter(
    model: PreTrainedModel,
    base_digest: str,
    directory: Path,
    *,
    updates: bool = False,
    is_ordered: bool = False,
) -> Supernet:
    """The supernet of a saved super-adapter; BaseMismatch on another base model. With `updates`
    without its head, for merging elsewhere; on a model without data (meta) the factors are real all
    the same. `is_ordered`: the model's channels stand in the supernet's order already.
    """
    about = read_super_adapter(directory, base_digest)
    space = SearchSpace.from_dict(read_yaml(directory / SPACE), str(directory / SPACE))
    adapter = from_dict(AdapterConfig, about["adapter"], str(directory / ABOUT))
    order = read_order(directory, space.bind(model, adapter.rank))
    net = Supernet(model, space, adapter, order=order, start=False, is_ordered=is_ordered)
    (net.load_updates if updates else net.load_factors)(read_factors(directory))
    net.compensation = saved_compensation(directory, net)
    return net


def saved_compensation(directory: Path, net: Supernet) -> Compensation | None:
    """With the moments of a super-adapter; None for one of an earlier version, or without.
    RunError for moments of layers of another size."""
    file = directory / MOMENTS
    if not file.is_file():
        return None
    moments = Moments(file)
    known = {site: net.layer(site).base.in_features for site in net.space.reading}
    known |= widths_of(net.space)
    for site, width in moments.widths.items():
        if known.get(site) != width:
            raise RunError(f"{file}: {site}, {width} wide, is no such layer here; train again")
    return Compensation(moments, device=net.device)


def read_order(directory: Path, space: BoundSpace) -> dict[str, Tensor]:
    """Of the channels, by group, or of none where they were left as they stand; RunError unless it
    permutes those of every group of this space."""
    order = read_tensors(directory / ORDER)
    if not order:
        return order
    groups = {group.name: group for group in space if group.dim != "rank"}
    if strange := sorted(set(order).symmetric_difference(groups)):
        verb = "is missing" if strange[0] in groups else "is no group of this space"
        raise RunError(f"{directory / ORDER}: {strange[0]} {verb} ({len(strange)} groups differ)")
    for name, group in groups.items():
        index, every = order[name], torch.arange(group.choices[0])
        wanted = every.expand(blank(group).shape)
        if not torch.equal(index.long().sort().values, wanted) or index.is_floating_point():
            raise RunError(
                f"{directory / ORDER}: {name} is no permutation of {len(every)} places, so that "
                "some would be doubled and others lost; the file is damaged, train again"
            )
        staying = set(places(group.blocks)[: group.staying])
        if set(index[: len(staying)].tolist()) != staying:
            raise RunError(f"{directory / ORDER}: {name} leaves out blocks that have to stay")
    return order


def read_factors(directory: Path) -> dict[str, Tensor]:
    """Of a super-adapter or a checkpoint; RunError for values of which products are infinite."""
    factors = read_tensors(directory / FACTORS)
    for name, tensor in factors.items():
        if tensor.is_floating_point() and tensor.numel() and float(tensor.abs().max()) > LARGEST:
            raise RunError(
                f"{directory / FACTORS}: {name} has values above {LARGEST:g}, whose products are "
                "infinite; the file is damaged, train again"
            )
    return factors


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All in a file of ours; RunError for one that is damaged."""
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise RunError(f"{file}: damaged, or not there: {one_line(error)}") from None


def read_super_adapter(directory: Path, base_digest: str) -> dict[str, Any]:
    """What is known of a super-adapter; BaseMismatch if it was trained on other base weights,
    RunError if a newer version wrote it."""
    missing = [n for n in (FACTORS, ORDER, SPACE, ABOUT) if not (directory / n).is_file()]
    if missing:
        raise RunError(f"{directory}: no super-adapter ({', '.join(missing)} missing); train first")
    about = read_about(directory)
    if about["base_digest"] != base_digest:
        raise BaseMismatch(
            f"{directory} was trained on {about['base_model']} with {about['base_digest']}, "
            f"the base model given has {base_digest}; pass the model it was trained on"
        )
    return about


def read_about(directory: Path) -> dict[str, Any]:
    """What the super-adapter in a directory says of itself; RunError for something else."""
    file = directory / ABOUT
    return shaped(read_json(file), {"base_model": str, "base_digest": str, "adapter": dict}, file)


def load_run(
    run: Run, dtype: Dtype | None = None, chosen: Chosen | None = None
) -> tuple[TrainConfig, loading.Base, Supernet]:
    """Settings, base model (in `dtype`, else as trained) and supernet of a finished run, with the
    factors of the chosen sub-adapter; BaseMismatch comes before weights load."""
    config, directory = run.config(), run.factors_of(chosen)
    folder = loading.locate(config.model.path)
    digest = digest_of(folder)
    read_super_adapter(directory, digest)
    wanted = config.model if dtype is None else dataclasses.replace(config.model, dtype=dtype)
    model = loading.load_model(folder, wanted)
    tokenizer = loading.load_tokenizer(config.model)
    require_tokenizer(run, tokenizer)
    base = loading.Base(model, tokenizer, digest)
    with busy("loading the super-adapter"):
        return config, base, load_super_adapter(model, digest, directory)
