"""A search space for a model nobody has written one for, found in the structure of its modules.

Blocks are what a ModuleList repeats. In a block, layers that lead from the hidden size to another
one and the layer that leads back are an MLP; modules that know the size of a head are attention.
What was found is tried on tensors without data before it is believed.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from elastic.config import AdapterConfig, SpaceShowConfig, TrainConfig
from elastic.console import busy, logging_at, say
from elastic.errors import ConfigError
from elastic.models import loading
from elastic.models.modules import modules_of
from elastic.spaces.declared import SearchSpace, describe
from elastic.spaces.dims import FIXED_HEADS, head_size_of
from elastic.spaces.mixtures import groups_of, mixtures, routers_of
from elastic.supernet.supernet import Supernet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


RANKS = [1.0, 0.5, 0.25]
WIDTHS = [1.0, 0.875, 0.75, 0.625, 0.5]
HEADS = [1.0, 0.75, 0.5]
KNOWN = {
    "llama": ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"),
    "phi3": ("phi3",),
    "bloom": ("bloom", "falcon"),
    "gpt-neox": ("gpt_neox",),
    "gpt2": ("gpt2",),
    "opt": ("opt",),
    "rwkv": ("rwkv",),
    "bert": ("bert", "roberta", "xlm-roberta"),
}
"""Shipped spaces, and the model types that they were tested with."""
AUTO = "auto"
RANK = 4
"""Of the factors that a cut is tried with."""
Shape = tuple[int, int]


def space_for(config: TrainConfig) -> SearchSpace:
    """The space to train in: the one declared, without ranks to choose from where they stay whole.
    ConfigError where nothing else would be elastic, and that was asked for."""
    space = declared_for(config)
    if not config.has_whole_ranks:
        return space
    if config.ranks == "whole" and space.has_ranks_alone:
        raise ConfigError(
            f"ranks whole: {space.source} has nothing but ranks to choose from; give elastic, or "
            "another space"
        )
    return space.with_whole_ranks()


def declared_for(config: TrainConfig | SpaceShowConfig) -> SearchSpace:
    """The space of that name; of `auto`, the one shipped for this type of model or, if there is
    none, the one discovered."""
    if config.space != AUTO:
        return SearchSpace.load(config.space)
    model_type = loading.architecture_of(config.model).model_type
    if shipped := shipped_for(model_type):
        return shipped
    with busy("looking for what can be cut"):
        space = discover(loading.skeleton(config.model))
    return told(space, model_type)


def shipped_for(model_type: str) -> SearchSpace | None:
    """The shipped space that was tested with this type of model; None if there is none."""
    name = next((name for name, types in KNOWN.items() if model_type in types), None)
    return SearchSpace.load(name) if name else None


def told(space: SearchSpace, model_type: str) -> SearchSpace:
    """The space, of which is said what it cuts."""
    for line in describe(space):
        say(f"Space of {model_type}: {line}")
    return space


def discover(model: PreTrainedModel) -> SearchSpace:
    """Ranks, MLP widths and attention heads of any model of repeated blocks (meta tensors will do).

    ConfigError when no repeated block has a linear layer.
    """
    used = called(model)
    sections = [section for section in _sections(model, used) if section["adapt"]]
    if not sections:
        raise ConfigError(
            f"space auto: {type(model).__name__} repeats no block with linear layers; write a "
            "search space (see search_spaces/)"
        )
    known = {re.sub(r"\.\d+", ".*", each.experts) for each in mixtures(model)}
    for name in _experts(model):
        cut = "not adapted" if name in known else "neither adapted nor cut"
        say(f"Space auto: {name} are {cut}; their weights are no linear layers")
    declared = [_tried(model, section, runs=used is not None) for section in sections]
    return SearchSpace.from_dict(declared, "space auto")


def _sections(model: nn.Module, used: set[str] | None) -> Iterator[dict[str, Any]]:
    """Of layers that are called, as far as that is known; of others the code reads the weight."""
    outer: list[str] = []
    for name, blocks in modules_of(model, nn.ModuleList):
        if any(name.startswith(f"{other}.") for other in outer):
            continue
        outer.append(name)
        linears = [_linears(block) for block in blocks]
        kinds = {tuple(sorted(each.items())) for each in linears}
        if len(kinds) == 1 and len(blocks) > 1:
            routers = routers_of(blocks[0])  # they are cut with the experts
            known = {n: shape for n, shape in linears[0].items()
                     if (used is None or f"{name}.0.{n}" in used)
                     and not f"{n}.".startswith(routers)}  # fmt: skip
            yield _section(f"{name}.*", blocks[0], known)


def _linears(block: nn.Module) -> dict[str, Shape]:
    """(out, in) by name."""
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in modules_of(block, nn.Linear)
    }


def _section(pattern: str, block: nn.Module, linears: Mapping[str, Shape]) -> dict[str, Any]:
    sizes = Counter(size for shape in linears.values() for size in shape)
    hidden = sizes.most_common(1)[0][0] if sizes else 0
    heads = {n: m for n, m in block.named_modules() if n and head_size_of(m) is not None}
    inside = {name for name in linears if any(name.startswith(f"{other}.") for other in heads)}
    mlps = list(_mlps({n: shape for n, shape in linears.items() if n not in inside}, hidden))
    groups: dict[str, Any] = {}
    adapted: set[str] = set()
    for number, (ups, down, fused) in enumerate(mlps):
        suffix = f"_{number}" if len(mlps) > 1 else ""
        groups[f"mlp_width{suffix}"] = {
            "dim": "width", "outputs": ups, "inputs": [down], "choices": WIDTHS, "align": 8,
            **({"fused": "parts"} if fused else {}),
        }  # fmt: skip
        groups[f"mlp_rank{suffix}"] = {"dim": "rank", "of": ups, "choices": RANKS}
        adapted |= {*ups, down}
    for number, (name, module) in enumerate(heads.items()):
        suffix = f"_{number}" if len(heads) > 1 else ""
        reading = [
            n for n, (_, into) in linears.items()
            if n.startswith(f"{name}.") and into == hidden and not _leads_out(n)
        ]  # fmt: skip
        if not reading:
            continue
        groups[f"attention_rank{suffix}"] = {"dim": "rank", "of": reading, "choices": RANKS}
        adapted |= set(reading)
        out = _projection_out(name, reading, linears)
        if len(reading) == 3 and out and not any(hasattr(module, n) for n in FIXED_HEADS):
            groups[f"heads{suffix}"] = {
                "dim": "heads", "outputs": reading, "inputs": [out], "choices": HEADS
            }  # fmt: skip
    groups |= groups_of(block)
    if not adapted and linears:
        groups["rank"] = {"dim": "rank", "of": list(linears), "choices": RANKS}
        adapted |= set(linears)
    return {"blocks": pattern, "adapt": [n for n in linears if n in adapted], "groups": groups}


def _mlps(linears: Mapping[str, Shape], hidden: int) -> Iterator[tuple[list[str], str, bool]]:
    """The layers that make channels, the one that reads them, and whether one layer makes several
    parts of them: by sizes, and among alike ones by where they stand."""
    for down, (out, width) in linears.items():
        if out != hidden or width == hidden:
            continue
        for fused in (False, True):
            made = [n for n, shape in linears.items() if shape == (width * (1 + fused), hidden)]
            near = [n for n in made if n.rpartition(".")[0] == down.rpartition(".")[0]]
            if made:
                yield near or made, down, fused
                break


def _leads_out(name: str) -> bool:
    """By its name: the projection back to the hidden size, which may be square."""
    leaf = name.rpartition(".")[2]
    return re.search(r"^(o|out|wo)(_|$)|output|^dense$|c_proj", leaf) is not None


def _projection_out(
    attention: str, reading: Sequence[str], linears: Mapping[str, Shape]
) -> str | None:
    """The layer that reads the heads: in the attention module, or beside it as in BERT."""
    wide = max(linears[name][0] for name in reading)
    beside = attention.rpartition(".")[0]
    found = [
        name
        for name, (_, columns) in linears.items()
        if columns == wide and _leads_out(name) and name.startswith(beside)
    ]
    return min(found, key=lambda name: not name.startswith(f"{attention}."), default=None)


def _experts(model: nn.Module) -> list[str]:
    """Modules that hold a weight for each of several experts in one tensor, numbers as *."""
    tensors = (name for name, parameter in model.named_parameters() if parameter.dim() == 3)
    modules = (re.sub(r"\.\d+", ".*", name.rpartition(".")[0]) for name in tensors)
    return list(dict.fromkeys(name for name in modules if "experts" in name))


def _tried(model: PreTrainedModel, section: dict[str, Any], *, runs: bool) -> dict[str, Any]:
    """The section without the groups whose cut the model's code does not follow, as far as it
    `runs` uncut, and without those that have one size alone."""
    kept = {name: spec for name, spec in section["groups"].items() if spec["dim"] == "rank"}
    for name, spec in section["groups"].items():
        if spec["dim"] == "rank":
            continue
        alone = SearchSpace.from_dict({**section, "groups": {name: spec}}, "space auto")
        reason = refusal(model, alone, RANK)
        if reason and not runs:
            reason = "uncut, the model does not run without data, so that no cut can be tried"
        if reason is None and all(len(group.choices) < 2 for group in alone.bind(model, RANK)):
            reason = "there is one size alone to choose from"
        if reason:
            say(f"Space auto leaves out {name} of {section['blocks']}: {reason}")
        else:
            kept[name] = spec
    return {**section, "groups": kept}


def require_fits(model: PreTrainedModel, space: SearchSpace, rank: int) -> None:
    """ConfigError for a space whose smallest sub-adapter the model cannot run, a layer left out of
    a group, say, or whose factors would do nothing. Nothing is said of a model whose code needs
    values, and runs at no size."""
    used = called(model)
    if used is None:
        return
    idle = next((site for site in space.bind(model, rank).targets if site not in used), None)
    if idle:
        raise ConfigError(
            f"{space.source}: adapt: {type(model).__name__} never calls {idle!r} (it may read its "
            "weight), so factors would do nothing there; leave it out"
        )
    if reason := refusal(model, space, rank):
        raise ConfigError(
            f"{space.source}: {type(model).__name__} runs whole, but not cut to the smallest "
            f"choices: {reason}; every layer that makes or reads the channels of a group must be "
            "in it"
        )


def called(model: PreTrainedModel) -> set[str] | None:
    """Names of the linear layers that are called; None if the model does not run without data."""
    names: set[str] = set()
    with _without_data(model) as (empty, inputs):
        for name, layer in modules_of(empty, nn.Linear):
            layer.register_forward_pre_hook(lambda *_, name=name: names.add(name))
        try:
            empty(**inputs)
        except Exception:  # whatever the model's code says
            return None
    return names


def refusal(model: PreTrainedModel, space: SearchSpace, rank: int) -> str | None:
    """Why the smallest sub-adapter, of factors of this rank, does not fit together; None if it
    does."""
    with _without_data(model) as (empty, inputs):
        try:
            net = Supernet(empty, space, AdapterConfig(rank=rank), start=False)
            with net.active(net.space.minimal()) as small:
                small(**inputs)
        except Exception as error:  # whatever the model's code says
            return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


@contextlib.contextmanager
def _without_data(model: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, dict[str, Tensor]]]:
    """A copy of a model (meta tensors will do) on tensors without data, and inputs for it."""
    log = logging_at("torch._subclasses.fake_tensor", logging.CRITICAL)  # failures are asked for
    with FakeTensorMode(), torch.no_grad(), log:
        memory = {}
        for tensor in (*model.parameters(), *model.buffers()):
            bare = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            memory[id(tensor)] = nn.Parameter(bare, False) if is_parameter else bare
        inputs = {"input_ids": torch.zeros((1, 2), dtype=torch.int64)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        empty = copy.deepcopy(model, memory)
        empty.set_attn_implementation("eager")  # fused kernels do not look at shapes without data
        if _experts(empty):  # one of their kernels knows one type, another looks at values
            empty.set_experts_implementation("batched_mm")
        yield empty, inputs
