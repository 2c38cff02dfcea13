"""`save_pretrained` of a compact model in memory. Its class and config are the family's, which do
not say its sizes: what transformers wrote of it, no one could load."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.errors import ExportError
from elastic.formats import hf
from elastic.spaces.bound import SubAdapter
from elastic.supernet import compact as cutting
from elastic.supernet.supernet import Supernet

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def compact(net: Supernet, sub: SubAdapter, degree: float = 0.0) -> PreTrainedModel:
    """`sub` as a model of plain linear layers, sliced and merged, whose `save_pretrained` writes
    its sizes. A part `degree` of what is cut is made up for. RunError for what is no point of the
    space."""
    return says_its_sizes_(cutting.compact(net, sub, degree))


def says_its_sizes_(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose `save_pretrained` is `hf.write` from now on: what a Trainer saves of it
    loads again."""
    model.save_pretrained = functools.partial(_save, model)
    return model


def _save(
    model: PreTrainedModel,
    save_directory: str | PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = hf.SHARD,
    variant: str | None = None,
    **more: Any,
) -> None:
    """As `PreTrainedModel.save_pretrained`, which saves PEFT's adapters alone where some are in the
    model. ExportError for what cannot be a folder, for a state that lacks tensors, for names of
    files with a variant in them, and for a push to a hub."""
    if getattr(model, "_hf_peft_config_loaded", False):
        kind = type(model)
        kind.save_pretrained(
            model, save_directory, is_main_process, state_dict, push_to_hub, max_shard_size,
            variant, **more
        )  # fmt: skip
        return
    if push_to_hub:
        raise ExportError(
            f"{save_directory}: a compact model is not pushed while it is saved; save it, then "
            "upload the folder: hf upload NAME FOLDER"
        )
    if variant is not None:
        raise ExportError(
            f"{save_directory}: variant {variant!r}: a compact model is saved without one; leave "
            "it out, and give it a folder of its own"
        )
    if reason := hf.why_not(model):
        raise ExportError(f"{save_directory}: {reason}")
    if is_main_process:
        given = None
        if state_dict is not None:
            given = {name: tensor.detach for name, tensor in state_dict.items()}
        hf.write(model, None, Path(save_directory), max_shard_size=max_shard_size, tensors=given)
