"""A search space for a model nobody has written one for, found in the structure of its modules.

Blocks are what a ModuleList repeats. In a block, layers that lead from the hidden size to another
one and the layer that leads back are an MLP; modules that know the size of a head are attention.
What was found is tried on tensors without data before it is believed.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from elastic import models
from elastic.adapters.attach import modules_of
from elastic.config import AdapterConfig, SpaceShowConfig, TrainConfig
from elastic.dims import FIXED_HEADS, head_size_of
from elastic.errors import ConfigError
from elastic.progress import say
from elastic.space import SearchSpace
from elastic.supernet import Supernet

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

Shape = tuple[int, int]


def space_for(config: TrainConfig | SpaceShowConfig) -> SearchSpace:
    """The space of that name; of `auto`, the one shipped for this type of model or, if there is
    none, the one discovered."""
    if config.space != AUTO:
        return SearchSpace.load(config.space)
    found = models.architecture_of(config.model).model_type
    for space, types in KNOWN.items():
        if found in types:
            return SearchSpace.load(space)
    space = discover(models.skeleton(config.model))
    for line in describe(space):
        say(f"Space of {found}: {line}")
    return space


def discover(model: PreTrainedModel) -> SearchSpace:
    """Ranks, MLP widths and attention heads of any model of repeated blocks (meta tensors will do).

    ConfigError when no repeated block has a linear layer.
    """
    sections = [section for section in _sections(model) if section["adapt"]]
    if not sections:
        raise ConfigError(
            f"space auto: {type(model).__name__} repeats no block with linear layers; write a "
            "search space (see search_spaces/)"
        )
    declared = [_tried(model, section) for section in sections]
    return SearchSpace.from_dict(declared, "space auto")


def describe(space: SearchSpace) -> list[str]:
    """What a space cuts, a line for each kind of block."""
    lines = []
    for section in space.sections:
        found = [f"{len(section.adapt)} adapted layers"]
        for spec in section.groups:
            what = spec.of or (*spec.outputs, "->", *spec.inputs)
            found.append(f"{spec.name} ({' '.join(what)})")
        lines.append(f"{section.blocks}: {', '.join(found)}")
    return lines


def _sections(model: nn.Module) -> Iterator[dict[str, Any]]:
    outer: list[str] = []
    for name, blocks in modules_of(model, nn.ModuleList):
        if any(name.startswith(f"{other}.") for other in outer):
            continue
        outer.append(name)
        kinds = {tuple(sorted(_linears(block).items())) for block in blocks}
        if len(kinds) == 1 and len(blocks) > 1:
            yield _section(f"{name}.*", blocks[0])


def _linears(block: nn.Module) -> dict[str, Shape]:
    """(out, in) by name."""
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in modules_of(block, nn.Linear)
    }


def _section(pattern: str, block: nn.Module) -> dict[str, Any]:
    linears = _linears(block)
    attention = [
        name for name, module in block.named_modules() if name and head_size_of(module) is not None
    ]
    inside = {name for name in linears if any(name.startswith(f"{a}.") for a in attention)}
    groups: dict[str, Any] = {}
    hidden = Counter(size for shape in linears.values() for size in shape).most_common(1)
    hidden = hidden[0][0] if hidden else 0
    downs = [
        name
        for name, (out, into) in linears.items()
        if out == hidden != into and name not in inside
    ]
    adapted: dict[str, None] = {}
    for number, down in enumerate(downs):
        ups, fused = _ups(down, linears, inside, hidden)
        if not ups:
            continue
        suffix = f"_{number}" if len(downs) > 1 else ""
        groups[f"mlp_width{suffix}"] = {
            "dim": "width", "outputs": ups, "inputs": [down], "choices": WIDTHS, "align": 8,
            **({"fused": "parts"} if fused else {}),
        }  # fmt: skip
        groups[f"mlp_rank{suffix}"] = {"dim": "rank", "of": ups, "choices": RANKS}
        adapted |= dict.fromkeys([*ups, down])
    for number, name in enumerate(attention):
        reading = [n for n in linears if n.startswith(f"{name}.") and linears[n][1] == hidden]
        reading = [n for n in reading if n not in adapted]
        suffix = f"_{number}" if len(attention) > 1 else ""
        into = [n for n in reading if not _leads_out(n)]
        if not into:
            continue
        groups[f"attention_rank{suffix}"] = {"dim": "rank", "of": into, "choices": RANKS}
        adapted |= dict.fromkeys(into)
        if heads := _heads(block, name, into, linears):
            groups[f"heads{suffix}"] = heads
    if not groups and linears:
        groups["rank"] = {"dim": "rank", "of": list(linears), "choices": RANKS}
        adapted |= dict.fromkeys(linears)
    order = [name for name in linears if name in adapted]
    return {"blocks": pattern, "adapt": order, "groups": groups}


def _ups(
    down: str, linears: Mapping[str, Shape], inside: set[str], hidden: int
) -> tuple[list[str], bool]:
    """The layers that make what `down` reads, and whether one of them makes several parts of it."""
    width, parent = linears[down][1], down.rpartition(".")[0]
    for fused in (False, True):
        made = [
            name
            for name, (out, into) in linears.items()
            if into == hidden and name not in inside and out == width * (1 + fused)
        ]
        near = [name for name in made if name.rpartition(".")[0] == parent]
        if near or made:
            return near or made, fused
    return [], False


def _leads_out(name: str) -> bool:
    """By its name: the projection back to the hidden size, which may be square."""
    leaf = name.rpartition(".")[2]
    return re.search(r"^(o|out|wo)(_|$)|output|^dense$|c_proj", leaf) is not None


def _heads(
    block: nn.Module, attention: str, into: list[str], linears: Mapping[str, Shape]
) -> dict[str, Any] | None:
    """Whole heads, where the module's code takes as many as its projections give."""
    module = block.get_submodule(attention)
    if len(into) != 3 or any(hasattr(module, name) for name in FIXED_HEADS):
        return None
    wide = max(linears[name][0] for name in into)
    above = attention.rpartition(".")[0]
    out = [
        name
        for name, (_, columns) in linears.items()
        if columns == wide and _leads_out(name) and name.startswith(f"{above}." if above else "")
        and name not in into
    ]  # fmt: skip
    near = [name for name in out if name.startswith(f"{attention}.")] or out
    if not near:
        return None
    return {"dim": "heads", "outputs": into, "inputs": near[:1], "choices": HEADS}


def _tried(model: PreTrainedModel, section: dict[str, Any]) -> dict[str, Any]:
    """The section without the groups whose cut the model's code does not follow."""
    kept = {name: spec for name, spec in section["groups"].items() if spec["dim"] == "rank"}
    for name, spec in section["groups"].items():
        if spec["dim"] == "rank":
            continue
        alone = {**section, "groups": {name: spec}}
        if _runs(model, SearchSpace.from_dict(alone, "space auto")):
            kept[name] = spec
    return {**section, "groups": kept}


def _runs(model: PreTrainedModel, space: SearchSpace) -> bool:
    """Whether the smallest sub-adapter fits together, on tensors without data."""
    with FakeTensorMode(), torch.no_grad():
        memory = {}
        for tensor in (*model.parameters(), *model.buffers()):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            memory[id(tensor)] = nn.Parameter(empty, False) if is_parameter else empty
        empty_model = copy.deepcopy(model, memory)
        inputs = {"input_ids": torch.zeros((1, 2), dtype=torch.int64)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        try:
            net = Supernet(empty_model, space, AdapterConfig(rank=4), start=False)
            with net.active(net.space.minimal()) as small:
                small(**inputs)
        except (ConfigError, RuntimeError, ValueError):
            return False
    return True
