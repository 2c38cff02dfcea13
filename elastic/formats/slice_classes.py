"""What a folder of every size has for those who load it with transformers alone: a configuration,
the classes of `elastic.formats.any_size`, and the sizes of every slice as these read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from elastic.adapters.layers import ElasticLinear
from elastic.files import write_text
from elastic.formats import any_size, choosing, hf
from elastic.formats.any_size import SIZES, VERSION, AnySize
from elastic.formats.auto_class import auto_of, has_auto
from elastic.models import cut_head
from elastic.models.modules import modules_of
from elastic.spaces.bound import SubAdapter
from elastic.supernet.supernet import Supernet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAID_ONCE = ("architectures", "auto_map", "dtype", "model_type", "transformers_version")
"""Of a configuration, what is the same of all sizes."""


def _words(model: PreTrainedModel) -> dict[str, Any]:
    """What a configuration says of the sizes of a model."""
    said = hf.described_config(model, code=False).to_dict()
    return {key: value for key, value in said.items() if key not in SAID_ONCE}


def sizes_of(
    net: Supernet, sub: SubAdapter, model: PreTrainedModel, rank_of: Callable[[int], int]
) -> dict[str, Any]:
    """Of a slice and its model, as `elastic.formats.any_size` reads it: what its configuration
    says, which blocks it runs, and by layer rows and columns (a number of the first ones, or of
    several parts the start and length of each) and rank; of a head that knows some tokens alone
    how many of which order."""
    with net.active(sub):
        gone = net.space.left_out(sub)
        layers = {
            site: [
                layer.size.row_parts or layer.size.rows,
                layer.size.column_parts or layer.size.columns,
                rank_of(layer.size.rank) if layer.adapter is not None else 0,
            ]
            for site, layer in modules_of(net.model, ElasticLinear)
            if not site.startswith(gone)
        }
    found = {"config": _words(model), "blocks": net.space.kept(sub), "layers": layers}
    if net.vocabulary and net.space.cuts_vocabulary(sub):
        group = net.vocabulary.group
        found["head"] = {"site": group.head, "order": group.name, "tokens": sub[group.name]}
    return found


def _apart(words: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """What is said otherwise than of the whole model, of its parts too."""
    found = {key: value for key, value in words.items() if value != whole.get(key)}
    for key, value in found.items():
        if isinstance(value, dict) and isinstance(whole.get(key), dict) and "model_type" in value:
            found[key] = _apart(value, whole[key])
    return found


_IMPORTS = f"""from .any_size import {AnySize.__name__}
from .choosing import FULL  # noqa: F401 (transformers 4 copies what is named in this file alone)"""


def write(
    base: PreTrainedModel, directory: Path, dtype: torch.dtype, sizes: Mapping[str, Any]
) -> str | None:
    """What transformers alone needs to load one size. Gives the name of the auto class that does;
    None, and nothing is written, for a base of which none knows the class, or whose code is its own
    folder's."""
    if base.is_remote_code() or not hf.is_plain(base) or not has_auto(base):
        return None
    config = hf.own_config(hf.described_config(base, code=False), type(base).__name__)
    hf.write_settings(base, config, directory, dtype, own=True)
    whole = _words(base)
    for one in sizes.values():
        one["config"] = _apart(one["config"], whole)
    write_text(directory / SIZES, json.dumps({"version": VERSION, "slices": sizes}) + "\n")
    cuts = any("head" in one for one in sizes.values())
    code = hf.code_of(base, AnySize.__name__, _IMPORTS, cuts_head=cuts)
    write_text(directory / hf.CODE, code)
    for module in (any_size, choosing, *([cut_head] if cuts else [])):
        hf.write_module(module, directory)
    return auto_of(type(base).__name__)
