"""The directory a super-adapter is kept in: written, read, and loaded over its base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from elastic.config import AdapterConfig, ModelConfig, TrainConfig
from elastic.config.model import Dtype
from elastic.config.parsing import from_dict
from elastic.errors import BaseMismatch, RunError
from elastic.files import new_directory, read_json, same_file, write_json, write_text
from elastic.models import loading
from elastic.models.digest import digest_of
from elastic.plain import read_yaml
from elastic.provenance import provenance
from elastic.run import Chosen, Run
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compensation import Compensation
from elastic.supernet.moments import Moments, save
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


def save_super_adapter(
    net: Supernet,
    directory: Path,
    *,
    model: ModelConfig,
    base_digest: str,
    factors: Mapping[str, Tensor] | None = None,
    moments: Mapping[str, Tensor] | None = None,
    **about: Any,
) -> None:
    """Write factors (the supernet's unless given), channel order, space, moments where known, and
    provenance, all at once or not at all."""
    with new_directory(directory) as building:
        factors = net.factor_state() if factors is None else factors
        save_file({k: v.cpu().contiguous() for k, v in factors.items()}, building / FACTORS)
        save_file({k: v.contiguous() for k, v in net.order.items()}, building / ORDER)
        if isinstance(moments, Moments):
            same_file(moments.file, building / MOMENTS)
        elif moments:
            save(moments, building / MOMENTS)
        write_text(building / SPACE, yaml.safe_dump(net.declared.as_dict(), sort_keys=False))
        write_json(
            building / ABOUT,
            {
                "base_model": model.path,
                "quantise": model.quantise,
                "base_digest": base_digest,
                "adapter": dataclasses.asdict(net.adapter),
                "sub_adapters": str(net.space.size),
                **provenance(str(net.model.device)),
                **about,
            },
        )


def load_super_adapter(
    model: PreTrainedModel, base_digest: str, directory: Path, *, updates: bool = False
) -> Supernet:
    """The supernet of a saved super-adapter; BaseMismatch on another base model. With `updates`
    without its head, for merging elsewhere; on a model without data (meta) the factors are real all
    the same.
    """
    about = read_super_adapter(directory, base_digest)
    space = SearchSpace.from_dict(read_yaml(directory / SPACE), str(directory / SPACE))
    adapter = from_dict(AdapterConfig, about["adapter"], str(directory / ABOUT))
    net = Supernet(model, space, adapter, order=read_order(directory), start=False)
    (net.load_updates if updates else net.load_factors)(read_factors(directory))
    net.compensation = saved_compensation(directory)
    return net


def saved_compensation(directory: Path) -> Compensation | None:
    """With the moments of a super-adapter; None for one of an earlier version, or without."""
    file = directory / MOMENTS
    return Compensation(Moments(file)) if file.is_file() else None


def read_order(directory: Path) -> dict[str, Tensor]:
    """Of the channels, by group; `read_super_adapter` checks the super-adapter first."""
    return load_file(directory / ORDER)


def read_factors(directory: Path) -> dict[str, Tensor]:
    """Of a super-adapter or a checkpoint."""
    return load_file(directory / FACTORS)


def read_super_adapter(directory: Path, base_digest: str) -> dict[str, Any]:
    """What is known of a super-adapter; BaseMismatch if it was trained on other base weights,
    RunError if a newer version wrote it."""
    missing = [n for n in (FACTORS, ORDER, SPACE, ABOUT) if not (directory / n).is_file()]
    if missing:
        raise RunError(f"{directory}: no super-adapter ({', '.join(missing)} missing); train first")
    about = read_json(directory / ABOUT)
    if about["base_digest"] != base_digest:
        raise BaseMismatch(
            f"{directory} was trained on {about['base_model']} with {about['base_digest']}, "
            f"the base model given has {base_digest}; pass the model it was trained on"
        )
    return about


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
    base = loading.Base(model, loading.load_tokenizer(config.model), digest)
    return config, base, load_super_adapter(model, digest, directory)
