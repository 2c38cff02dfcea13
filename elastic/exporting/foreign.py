"""Adapters trained elsewhere, as what they change of the full-size base model.

A run of ours with any method, or any adapter that stock PEFT can load and merge (LoRA with rank
patterns, DoRA, IA3 ...).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elastic.config import ModelConfig
from elastic.console import say
from elastic.errors import RunError
from elastic.exporting.probes import agreement, probe, require_agreement
from elastic.files import read_json
from elastic.formats import peft, peft_config
from elastic.formats.peft import PEFT_WEIGHTS
from elastic.formats.peft_config import PEFT_CONFIG, reason_of, stock_config
from elastic.formats.runner import runner_of
from elastic.models import loading
from elastic.models.head import head_of
from elastic.models.modules import linear_, of_conv1d_
from elastic.models.ties import untie_
from elastic.spaces.targets import is_transposed
from elastic.supernet.base_order import factors_of_base
from elastic.supernet.store import ABOUT, load_super_adapter, read_super_adapter

ROUNDING = 1e-4
"""How far merging may move the logits, in parts of the largest; PEFT keeps factors in float32."""


SUPER = "super_adapter"
"""In a run."""


@dataclass(frozen=True)
class Update:
    """What one adapter adds to the base model, in the base model's channel order."""

    name: str
    kind: str
    """The method, and the rank it has as a plain LoRA where it has one."""
    deltas: Mapping[str, Tensor]
    """By parameter name, float32 or wider; parameters that are not changed are absent."""


def identify(path: str, base_digest: str, model: ModelConfig | None = None) -> Path:
    """The directory that holds the adapter, which comes from the hub where `path` is a name there;
    no tensors are read.

    RunError when there is none, it would have to be unpickled or cannot be merged (into this base,
    where it is given), BaseMismatch when it is known to be of another base.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise RunError(
                f"merge: {path}: no such directory; give a run, an adapter's folder, or the hub "
                "name of one (owner/name)"
            )
        folder = Path(loading.from_hub(path, (PEFT_CONFIG, PEFT_WEIGHTS, f"{SUPER}/*"), "merge:"))
    for place in (folder / SUPER, folder):
        if (place / ABOUT).is_file():
            read_super_adapter(place, base_digest)
            return place
    if not (folder / PEFT_CONFIG).is_file():
        raise RunError(
            f"merge: {path}: neither a run with a super-adapter nor a PEFT adapter "
            f"({PEFT_CONFIG} is missing)"
        )
    if not (folder / PEFT_WEIGHTS).is_file():
        raise RunError(
            f"merge: {path}: {PEFT_WEIGHTS} is missing; pickled weights (.bin) are not read, save "
            "the adapter as safetensors"
        )
    peft.require_base(folder, base_digest, "merge:")
    config = stock_config(folder, "merge:")
    reason = peft_config.why_not_merged(config)
    if model is not None and (bare := peft_config.bias_missing(config, loading.skeleton(model))):
        reason = f"it trained biases, and {bare} of {model.path} has none"
    if reason:
        raise RunError(f"merge: {folder} cannot be merged: {reason}")
    return folder


def name_of(path: str) -> str:
    """What an adapter is called: as its folder is, or its repository on the hub."""
    place = Path(path).expanduser().resolve()
    return place.parent.name if place.name == SUPER else place.name


def read(
    folder: Path, model: ModelConfig, base_digest: str, prompts: Sequence[np.ndarray] = ()
) -> Update:
    """The update of an identified adapter. ExportError where a PEFT adapter computes something else
    for the prompts, each (1, length) int64, once it is merged."""
    if (folder / ABOUT).is_file():
        return _of_super_adapter(folder, model, base_digest)
    return _of_peft(folder, model, prompts)


@torch.no_grad()
def _of_super_adapter(folder: Path, model: ModelConfig, base_digest: str) -> Update:
    """The maximal sub-adapter's update; factors are read, base weights are not."""
    dtype = loading.resolve_dtype(model.dtype, loading.resolve_device(model.device))
    net = load_super_adapter(loading.skeleton(model).to(dtype), base_digest, folder, updates=True)
    scales = {site: adapter.scale for site, adapter in net.adapters()}
    deltas, ranks = {}, set()
    for site, A, B in factors_of_base(net):
        ranks.add(B.shape[-1])
        name, delta = f"{site}.weight", scales[site] * B @ A
        if mixture := net.space.experts_of(site):
            name, delta = site, delta.mT if is_transposed(mixture) else delta
        deltas[name] = delta
    if net.head:
        _say_of_head(folder, net.head)
    kind = f"{net.adapter.resolved_method}, LoRA rank {max(ranks)}"
    return Update(name_of(str(folder)), kind, deltas)


@torch.no_grad()
def _of_peft(folder: Path, model: ModelConfig, prompts: Sequence[np.ndarray]) -> Update:
    """PEFT merges the adapter into a fresh base model, not quantised as it knows no such layers of
    ours; what has changed is the update. Tied weights are parted before that, as an adapter may
    change one end alone, and layers of GPT-2 lie as they did when it was trained, as it may hold
    some whole."""
    theirs = read_json(folder / PEFT_CONFIG).get("base_model_name_or_path")
    if theirs and theirs != model.path:
        say(f"{folder} says that it was trained on {theirs}; shapes are all that can be compared")
    weights = peft.weights_of(folder, "merge:")
    dense = dataclasses.replace(model, quantise="none")
    wide = loading.load_model(loading.locate(model.path), dense)
    before = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    adapted: Any = peft.attached(of_conv1d_(wide), folder, weights, "merge:", model.path).eval()
    config: Any = adapted.peft_config["default"]
    kind = "dora" if getattr(config, "use_dora", False) else config.peft_type.value.lower()
    unmerged = [probe(adapted.get_base_model(), prompt) for prompt in prompts]
    untie_(adapted.get_base_model())
    tied = wide.config.tie_word_embeddings
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*tie_word_embeddings")  # ends are merged apart
            after = linear_(adapted.merge_and_unload(safe_merge=True))
    except Exception as error:  # every method merges in a way of its own
        raise RunError(f"merge: PEFT cannot merge {folder}: {reason_of(error)}") from None
    after.config.tie_word_embeddings = tied  # some classes compute something else without
    require_agreement(
        f"merge: {folder}, merged by PEFT", agreement(runner_of(after), unmerged), ROUNDING,
        than="the adapter unmerged",
    )  # fmt: skip
    return Update(folder.name, f"peft {kind}", _changes(before, after, folder))


def _changes(before: Mapping[str, Tensor], after: nn.Module, folder: Path) -> dict[str, Tensor]:
    # A head is of its own classes; what was trained below it is merged.
    head = set(head_of(after))
    own = {name for name, _ in after.named_parameters()} - head
    changed, left_out = {}, []
    for name, tensor in after.state_dict().items():
        if name not in before:
            raise RunError(f"merge: {folder} adds {name}, which the base model does not have")
        if torch.equal(tensor, before[name]):
            continue
        if name in own:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            changed[name] = tensor.to(wide) - before[name].to(wide)
        elif name in head:
            left_out.append(name)
    if left_out:
        _say_of_head(folder, left_out)
    return changed


def _say_of_head(folder: Path, names: Collection[str]) -> None:
    say(
        f"{folder}: what it trained of its head ({', '.join(names)}) is not merged; the head stays "
        "that of the run"
    )
