"""A sub-adapter as a stock PEFT LoRA on the untouched base model."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from elastic.adapters.layers import ElasticLinear
from elastic.errors import ExportError
from elastic.models.kinds import Kind, classes_of, kind_of
from elastic.models.modules import modules_of
from elastic.spaces.bound import SubAdapter
from elastic.supernet.supernet import Supernet

if TYPE_CHECKING:
    from torch import Tensor

TASK_TYPES = {Kind.DECODER: "CAUSAL_LM", Kind.ENCODER_DECODER: "SEQ_2_SEQ_LM",
              Kind.CLASSIFIER: "SEQ_CLS"}  # fmt: skip


def why_not(net: Supernet, sub: SubAdapter) -> str | None:
    """The reason this sub-adapter cannot be a PEFT adapter; None if it can."""
    if kind_of(net.model) is Kind.RECURRENT:
        return (
            "transformers halves some weights of this model in place at inference, which the "
            "layers of PEFT do not follow; merge it (hf)"
        )
    cut = [
        group.name
        for group in net.space
        if group.dim != "rank" and sub[group.name] not in (0, group.choices[0])
    ]
    if not cut:
        return None
    return (
        f"{len(cut)} groups cut the base model itself ({cut[0]}, ...), which a PEFT adapter cannot "
        "express; merge it (hf), or choose a sub-adapter that cuts ranks only"
    )


def write(
    net: Supernet,
    sub: SubAdapter,
    directory: Path,
    *,
    base_model: str,
    base_digest: str | None = None,
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors, loadable by stock PEFT.

    Ranks differ between layers (`rank_pattern`); alpha follows (`alpha_pattern`), so that PEFT's
    alpha / r is the scale every rank was trained with. Channels go back to the base model's order.
    The digest of the base's weights goes into the file's metadata, which merging checks, and the
    names of the classes of a head.
    ExportError if base channels are cut.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    if reason := why_not(net, sub):
        raise ExportError(f"peft: {reason}")
    original = {key: torch.argsort(index) for key, index in net.permutations().items()}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    with net.active(sub), torch.no_grad():
        for site, layer in modules_of(net.model, ElasticLinear):
            if layer.adapter is None or (factors := layer.factors()) is None:
                continue
            A, B = factors
            B = B / layer.adapter.scale
            if (site, "in") in original:
                A = A[:, original[site, "in"]]
            if (site, "out") in original:
                B = B[original[site, "out"]]
            ranks[site] = A.shape[0]
            alphas[site] = layer.adapter.scale * A.shape[0]
            tensors[f"base_model.model.{site}.lora_A.weight"] = A.contiguous().cpu()
            tensors[f"base_model.model.{site}.lora_B.weight"] = B.contiguous().cpu()
        for name, parameter in net.head.items():
            tensors[f"base_model.model.{name}"] = parameter.contiguous().cpu()
    rank, alpha = max(ranks.values()), max(alphas.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type] # PEFT computes with fractions, too
        target_modules=_targets(net, ranks),
        rank_pattern={site: r for site, r in ranks.items() if r != rank},
        alpha_pattern={site: a for site, a in alphas.items() if a != alpha},
        base_model_name_or_path=base_model,
        task_type=TASK_TYPES[kind_of(net.model)],
        modules_to_save=_saved_whole(net),
        inference_mode=True,
    )
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    metadata = {"format": "pt"} | ({} if base_digest is None else {DIGEST: base_digest})
    if net.head:
        metadata["classes"] = json.dumps(classes_of(net.model))
    save_file(tensors, directory / PEFT_WEIGHTS, metadata=metadata)
    return directory


def _saved_whole(net: Supernet) -> list[str] | None:
    """The modules of a classification head."""
    body = f"{net.model.base_model_prefix}."
    return sorted({name.removeprefix(body).partition(".")[0] for name in net.head}) or None


def _targets(net: Supernet, sites: Collection[str]) -> list[str]:
    """Names of layers as PEFT matches them: the last part, unless others have that too."""
    short = {site.rpartition(".")[2] for site in sites}
    layers = (
        name for kind in (ElasticLinear, nn.Linear) for name, _ in modules_of(net.model, kind)
    )
    own = [name for name in layers if not name.endswith(".base")]
    alike = {name for name in own if name.rpartition(".")[2] in short}
    return sorted(short) if alike == set(sites) else sorted(sites)


PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIGEST = "base_digest"
"""Where an adapter that we wrote names its base, in the metadata of its tensors."""
