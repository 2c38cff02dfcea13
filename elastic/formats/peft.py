"""A sub-adapter as a stock PEFT LoRA on the untouched base model, and a stock LoRA read back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from elastic.adapters.layers import ElasticLinear
from elastic.errors import BaseMismatch, ExportError, RunError
from elastic.formats import peft_parameters
from elastic.formats.peft_config import (
    CHANGES_BASE,
    PEFT_CONFIG,
    reason_of,
    start_of,
    stock_config,
)
from elastic.models.kinds import Kind, classes_of, kind_of
from elastic.models.modules import modules_of
from elastic.spaces.bound import SubAdapter
from elastic.spaces.dims import VOCABULARY
from elastic.supernet.base_order import factors_of_base
from elastic.supernet.supernet import Supernet

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

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
        if group.dim not in ("rank", VOCABULARY) and sub[group.name] not in (0, group.choices[0])
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
    scales = {site: adapter.scale for site, adapter in net.adapters()}
    experts = _stored_experts(net)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    with net.active(sub), torch.no_grad():
        for site, A, B in factors_of_base(net):
            ranks[site] = B.shape[-1]
            alphas[site] = scales[site] * ranks[site]
            if site in experts:
                A, B = peft_parameters.as_stored(A, B)
            name = f"base_model.model.{experts.get(site, site)}"
            tensors[f"{name}.lora_A.weight"] = A.contiguous().cpu()
            tensors[f"{name}.lora_B.weight"] = B.contiguous().cpu()
        for name, parameter in net.head.items():
            tensors[f"base_model.model.{name}"] = parameter.contiguous().cpu()
    # PEFT warns of patterns for parameters, which it follows all the same.
    rank, alpha = max(ranks.values()), max(alphas.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type] # PEFT computes with fractions, too
        target_modules=_targets(net, [site for site in ranks if site not in experts]),
        target_parameters=peft_parameters.targets_of(net.model, experts) if experts else None,
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


def _stored_experts(net: Supernet) -> dict[str, str]:
    """By matrix of all experts with factors, what PEFT calls its wrapper."""
    found: dict[str, str] = {}
    for mixture in net.space.adapted:
        adapted = net.mixtures[mixture.experts].experts.factors
        parameters = [held.name for held in mixture.tensors]
        names = peft_parameters.stored_names(mixture.experts, parameters, adapted)
        found |= {f"{mixture.experts}.{leaf}": name for leaf, name in names.items()}
    return found


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


PEFT_WEIGHTS = "adapter_model.safetensors"
DIGEST = "base_digest"
"""Where an adapter that we wrote names its base, in the metadata of its tensors."""


WITHOUT = (
    "use_dora", "modules_to_save", "bias", "trainable_token_indices", "lora_bias",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication",
    "monteclora_config", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""Settings of a LoRA that change more than B A."""


def lora_config(folder: Path) -> LoraConfig:
    """The configuration of a stock LoRA that is nothing but B A, and perhaps a trained head; reads
    no weights. RunError for anything else."""
    where = "adapter.from"
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        if not (folder / name).is_file():
            raise RunError(
                f"{where} {folder}: {name} is missing; give the folder of a PEFT adapter, "
                "saved as safetensors, or none"
            )
    config: Any = stock_config(folder, where)
    kind = config.peft_type.value
    if kind != "LORA":
        raise RunError(
            f"{where} {folder}: a LoRA can be taken over, this is {kind}; merge it into a "
            "sub-adapter at export instead (merge.adapters)"
        )
    others = {name: getattr(config, name, None) for name in WITHOUT}
    others["bias"] = None if others["bias"] == "none" else others["bias"]
    if config.task_type == TASK_TYPES[Kind.CLASSIFIER]:
        others.pop("modules_to_save")  # its head
    if more := {name: value for name, value in others.items() if value}:
        raise RunError(
            f"{where} {folder}: it trained more than two factors per layer ({more}); merge it "
            "into its base model and give adapter.from none"
        )
    if start_of(config).startswith(CHANGES_BASE):
        raise RunError(
            f"{where} {folder}: it began by {start_of(config)}, so it belongs to a changed base; "
            "convert it first: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return config


def lora_rank(folder: Path) -> int:
    """The largest rank of a stock LoRA; RunError for another adapter."""
    config = lora_config(folder)
    return max([config.r, *(config.rank_pattern or {}).values()])


def lora_sites(folder: Path) -> list[str]:
    """The layers and matrices of experts that a stock LoRA changes; reads names alone. RunError
    where it changes embeddings too."""
    where = "adapter.from"
    with _opened(folder, where) as file:
        names = list(file.keys())
    if embedding := next((name for name in names if ".lora_embedding_" in name), None):
        raise RunError(
            f"{where} {folder}: {embedding} adapts embeddings, which no space does; merge it into "
            "its base model and give adapter.from none"
        )
    ending = ".lora_A.weight"
    sites = [
        name.removeprefix("base_model.model.").removesuffix(ending)
        for name in names
        if name.endswith(ending)
    ]
    config: Any = stock_config(folder, where)
    parameters = config.target_parameters
    return peft_parameters.sites_of(sites, parameters) if parameters else sites


@contextlib.contextmanager
def _opened(folder: Path, where: str) -> Iterator[Any]:
    """An adapter's tensors on disk; RunError where safetensors cannot read them."""
    try:
        with safe_open(folder / PEFT_WEIGHTS, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"{where} {folder / PEFT_WEIGHTS} cannot be read ({error}); fetch or save it again"
        ) from None


def require_base(folder: Path, base_digest: str, where: str) -> None:
    """BaseMismatch where an adapter's file names another base; `where` begins every message."""
    with _opened(folder, where) as file:
        theirs = (file.metadata() or {}).get(DIGEST, base_digest)
    if theirs != base_digest:
        raise BaseMismatch(
            f"{where} {folder} was trained on a base with {theirs}, this run's has {base_digest}"
        )


def weights_of(folder: Path, where: str) -> dict[str, Tensor]:
    """An adapter's own tensors; RunError for NaN."""
    with _opened(folder, where) as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise RunError(f"{where} {folder / PEFT_WEIGHTS}: {name} holds NaN or infinite values")
    return weights


def attached(
    model: PreTrainedModel, folder: Path, weights: Mapping[str, Tensor], where: str, base: str
) -> PeftModel:
    """An adapter on its base, as PEFT loads it; BaseMismatch where it does not fit, RunError unless
    all of its `weights`, and nothing else, belong there."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers as as_called_now,
    )

    config: Any = stock_config(folder, where)
    most = max((max(tensor.shape, default=0) for tensor in weights.values()), default=0)
    if config.peft_type == "LORA" and config.r > most:
        raise RunError(
            f"{where} {folder}: rank {config.r} is more than any tensor of {PEFT_WEIGHTS} has, "
            f"{most}"
        )
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), config=config)
        expected = set(get_peft_model_state_dict(adapted))
        # Experts were layers of their own in transformers 4, and PEFT puts their factors together.
        found = set(as_called_now(adapted, config, dict(weights)))
    except Exception as error:  # methods check what they get in ways of their own
        raise BaseMismatch(f"{where} {folder} does not fit {base}: {reason_of(error)}") from None
    # What belongs nowhere is named before what is missing for it.
    if strange := sorted(found - expected) + sorted(expected - found):
        verb = "is missing" if strange[0] in expected else "belongs to no layer of this model"
        raise RunError(
            f"{where} {folder / PEFT_WEIGHTS}: {strange[0]} {verb} ({len(strange)} tensors differ)"
        )
    return adapted


@torch.no_grad()
def read_lora(
    model: PreTrainedModel, folder: Path, base: str, base_digest: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """A (rank, in) and B (out, rank), scaled and in float32, of every layer that a stock LoRA
    changes, of every expert (experts, ...) where it is a matrix of all, as PEFT reads it onto this
    model, which gets the head that was trained along and stays as it was otherwise. RunError for an
    adapter of another model, or with NaN; BaseMismatch where its file names another base."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora.layer import ParamWrapper

    where = "adapter.from"
    require_base(folder, base_digest, where)
    adapted: Any = attached(model, folder, weights_of(folder, where), where, base)
    found = {}
    for name, layer in modules_of(adapted.base_model.model, Linear):
        factors: list[Any] = [part["default"] for part in (layer.lora_A, layer.lora_B)]
        A, B = (factor.weight.detach().float() for factor in factors)
        found[name] = A.clone(), layer.scaling["default"] * B
    for name, wrapper in modules_of(adapted.base_model.model, ParamWrapper):
        stored: list[Any] = [part["default"] for part in (wrapper.lora_A, wrapper.lora_B)]
        lora_A, lora_B = (factor.weight.detach().float().clone() for factor in stored)
        A, B = peft_parameters.as_factors(lora_A, lora_B, wrapper.num_experts)
        site = f"{name.replace(peft_parameters.INSIDE, '')}.{wrapper.parameter_name}"
        found[site] = A, wrapper.scaling["default"] * B
    adapted.base_model.unload()
    model.requires_grad_(False)
    return found
