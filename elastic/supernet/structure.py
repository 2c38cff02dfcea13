"""What a block is made of: attention, mixers of other sorts, MLPs and experts.

Blocks of one list that are built alike are of one kind. In a block, modules that know the size of a
head are attention; those that hold a convolution mix tokens in another way (state spaces, linear
attention, short convolutions); layers that lead from the hidden size to another one and the layer
that leads back are an MLP; tensors with a weight for each of several experts are routed.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from elastic.models.modules import modules_of, outermost
from elastic.spaces.dims import FIXED_HEADS, head_size_of, is_latent
from elastic.spaces.mixtures import groups_of, mixtures, routers_of
from elastic.spaces.pattern import pattern_of
from elastic.supernet.listed_experts import experts_of, lists_of

RANKS = [1.0, 0.5, 0.25]
WIDTHS = [1.0, 0.875, 0.75, 0.625, 0.5]
HEADS = [1.0, 0.75, 0.5]
DEPTHS = [1.0, 0.875, 0.75]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
Shape = tuple[int, int]
"""(out, in)"""


@dataclass(frozen=True)
class Kind:
    """Blocks of one list that are built alike, and what was found in them."""

    blocks: str
    """A pattern of their names."""
    count: int
    parts: tuple[str, ...]
    """For a reader: classes of attention, mixers, MLPs and experts."""
    section: dict[str, Any]
    """What may be elastic, as a space declares it, before any of it is tried."""
    mixers: tuple[str, ...] = ()
    """Modules whose inner sizes stay as they are."""
    mixtures: tuple[str, ...] = ()
    """Modules of experts, which are cut as they are."""
    experts: tuple[str, ...] = ()
    """Those whose weights are neither adapted nor cut."""


def kinds_of(model: nn.Module, used: set[str] | None, inside: str = "") -> Iterator[Kind]:
    """Of every outermost list of several blocks, those `inside` of the module of that name alone.
    Layers that carry factors are `used`, as far as that is known; of others the code reads the
    weight."""
    for place, blocks in outermost(model.get_submodule(inside), nn.ModuleList):
        name = f"{inside}.{place}" if inside else place
        if len(blocks) < 2:
            continue
        alike: dict[Any, list[int]] = {}
        for number, block in enumerate(blocks):
            alike.setdefault(_built(block), []).append(number)
        linears = [_linears(block) for block in blocks]
        hidden, shared = _hidden(linears), _shared(blocks)
        for numbers in alike.values():
            first = numbers[0]
            known = {n: shape for n, shape in linears[first].items()
                     if (used is None or f"{name}.{first}.{n}" in used)
                     and not f"{n}.".startswith(routers_of(blocks[first]))
                     and blocks[first].get_submodule(n).weight not in shared}  # fmt: skip
            pattern = pattern_of(name, numbers, len(blocks))
            yield _kind(pattern, len(numbers), blocks[first], known, hidden)


def _built(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks of one kind: their linear layers, what holds them, and their experts."""
    linears = _linears(block)
    holders = {name.rpartition(".")[0] for name in linears}
    classes = tuple((name, type(block.get_submodule(name))) for name in sorted(holders))
    experts = tuple((name, tensor.shape) for name, tensor in routed(block))
    return tuple(sorted(linears.items())), classes, experts


def _linears(block: nn.Module) -> dict[str, Shape]:
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in modules_of(block, nn.Linear)
    }


def _shared(blocks: Iterable[nn.Module]) -> set[Tensor]:
    """Weights of layers in several blocks: cut or adapted in one, they would be so in all."""
    linears = (layer for block in blocks for _, layer in modules_of(block, nn.Linear))
    times = Counter(layer.weight for layer in linears)
    return {weight for weight, count in times.items() if count > 1}


def _hidden(linears: Sequence[Mapping[str, Shape]]) -> int:
    """The size of what blocks pass on: the one that most of their layers read or make, and of two
    that are as common the one that the first layer reads."""
    shapes = (shape for each in linears for shape in each.values())
    sizes = Counter(size for out, into in shapes for size in (into, out))
    return sizes.most_common(1)[0][0] if sizes else 0


def routed(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Tensors that hold a weight for each of several experts, (experts, ..., ...)."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 3 and "experts" in name:
            yield name, parameter


def _kind(
    pattern: str, count: int, block: nn.Module, linears: Mapping[str, Shape], hidden: int
) -> Kind:
    attention, mixers = _token_mixers(block)
    # Which tokens an expert gets is not known outside of their list, so channels are not ordered.
    listed = {name: [n for n in linears if n.startswith(f"{name}.")] for name, _ in lists_of(block)}
    inside = {n for n in linears if any(n.startswith(f"{o}.") for o in (*attention, *mixers))}
    inside |= {n for own in listed.values() for n in own}
    mlps = list(_mlps({n: shape for n, shape in linears.items() if n not in inside}, hidden))
    groups: dict[str, Any] = {}
    adapted: set[str] = set()

    def adapt(group: str, layers: Iterable[str]) -> None:
        if left := [name for name in dict.fromkeys(layers) if name not in adapted]:
            groups[group] = {"dim": "rank", "of": left, "choices": RANKS}
            adapted.update(left)

    for suffix, (ups, down, fused) in _numbered(mlps):
        groups[f"mlp_width{suffix}"] = {
            "dim": "width", "outputs": ups, "inputs": [down], "choices": WIDTHS, "align": 8,
            **({"fused": "parts"} if fused else {}),
        }  # fmt: skip
        adapt(f"mlp_rank{suffix}", [*ups, down])
    for suffix, (name, module) in _numbered(list(attention.items())):
        outputs, out = _heads(name, module, linears, hidden)
        own = [n for n in linears if n.startswith(f"{name}.")]
        adapt(f"attention_rank{suffix}", [*own, *([out] if out else [])])
        if outputs and out:
            groups[f"heads{suffix}"] = {
                "dim": "heads", "outputs": outputs, "inputs": [out], "choices": HEADS
            }  # fmt: skip
    for suffix, (name, module) in _numbered(list(mixers.items())):
        own = [n for n in linears if n.startswith(f"{name}.") and _is_adapted(module, n)]
        adapt(f"mixer_rank{suffix}", own)
    for suffix, own in _numbered(list(listed.values())):
        adapt(f"expert_rank{suffix}", own)
    for name, rest in _rest(block, linears, {*adapted, *inside}).items():
        adapt(f"{name}_rank" if name else "rank", rest)
    cut = {each.experts for each in mixtures(block)}
    groups |= groups_of(block)
    experts: dict[str, int] = {n.rpartition(".")[0]: len(t) for n, t in routed(block)}
    lists = {name: len(experts_of(module)) for name, module in lists_of(block)}
    holders = dict.fromkeys(type(block.get_submodule(_parent(d))).__name__ for _, d, _ in mlps)
    return Kind(
        pattern,
        count,
        (
            *(type(m).__name__ for m in (*attention.values(), *mixers.values())),
            *holders,
            *(f"{number} experts" for number in (*experts.values(), *lists.values())),
        ),
        {"blocks": pattern, "adapt": [n for n in linears if n in adapted], "groups": groups},
        tuple(f"{pattern}.{name}" for name in mixers),
        tuple(f"{pattern}.{name}" for name in cut),
        tuple(f"{pattern}.{name}" for name in experts if name not in cut),
    )


def _numbered(items: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Each with what its groups are called by behind their names, where there are several."""
    for number, item in enumerate(items):
        yield f"_{number}" if len(items) > 1 else "", item


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _token_mixers(block: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Attention, and what mixes tokens otherwise, by name; the outermost where they are nested."""
    attention: dict[str, nn.Module] = {}
    mixers: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in (*attention, *mixers)):
            continue
        if any(isinstance(child, CONVOLUTIONS) for child in module.children()):
            if any(modules_of(module, nn.Linear)):
                mixers[name] = module
        elif head_size_of(module) is not None:
            attention[name] = module
    return attention, mixers


# Attention


def _heads(
    name: str, module: Any, linears: Mapping[str, Shape], hidden: int
) -> tuple[list[str], str | None]:
    """The layers that make the heads of attention, none where its code counts on all of them, and
    the layer that reads them, if it was found."""
    if is_latent(module):
        return _latent_heads(name, module, linears)
    reading = [
        n for n, (_, into) in linears.items()
        if n.startswith(f"{name}.") and into == hidden and not _leads_out(n)
    ]  # fmt: skip
    out = _projection_out(name, reading, linears) if reading else None
    if out is None or any(hasattr(module, n) for n in FIXED_HEADS):
        return [], out
    channels = linears[out][1]
    gated = (channels, channels // (head_size_of(module) or 1))
    gates = [n for n in reading[3:] if linears[n][0] in gated]
    return reading if len(reading) == 3 + len(gates) else [], out


def _latent_heads(
    name: str, module: Any, linears: Mapping[str, Shape]
) -> tuple[list[str], str | None]:
    """The same where keys and values of all heads are made from one latent state."""
    own = [n for n in linears if _parent(n) == name]
    out = next((n for n in own if _leads_out(n)), None)
    keys = module.num_heads * (module.qk_nope_head_dim + module.v_head_dim)
    queries = module.num_heads * (module.qk_nope_head_dim + module.qk_rope_head_dim)
    latent = getattr(module, "q_lora_rank", None)
    made = [
        n for n in own
        if linears[n] == (keys, module.kv_lora_rank)
        or (linears[n][0] == queries and latent in (None, linears[n][1]))
    ]  # fmt: skip
    return made if len(made) == 2 else [], out


def _leads_out(name: str) -> bool:
    """By its name: the projection back to the hidden size, which may be square."""
    leaf = name.rpartition(".")[2]
    return re.search(r"^(o|out|wo)(_|$)|output|^dense$|c_proj", leaf) is not None


def _projection_out(
    attention: str, reading: Sequence[str], linears: Mapping[str, Shape]
) -> str | None:
    """The layer that reads the heads: in the attention module, or beside it as in BERT. Queries may
    have a gate beside each of them."""
    wide = max(linears[name][0] for name in reading)
    beside = _parent(attention)
    for columns in (wide, wide // 2):
        found = [
            name
            for name, (_, into) in linears.items()
            if into == columns and _leads_out(name) and name.startswith(beside)
        ]
        if found:
            return min(found, key=lambda name: not name.startswith(f"{attention}."))
    return None


# What mixes tokens otherwise


def _is_adapted(mixer: nn.Module, name: str) -> bool:
    """Whether factors of a layer would always be used: where fused kernels are installed, the code
    of some mixers hands them its weight."""
    try:
        code = inspect.getsource(type(mixer))
    except (OSError, TypeError):  # a class that was made without a file
        return True
    return re.search(rf"\bself\.{re.escape(name.rpartition('.')[2])}\.weight\b", code) is None


# MLPs


def _mlps(linears: Mapping[str, Shape], hidden: int) -> Iterator[tuple[list[str], str, bool]]:
    """The layers that make channels, the one that reads them, and whether one layer makes several
    parts of them: by sizes, and among alike ones by where they stand."""
    taken: set[str] = set()
    for down, (out, width) in linears.items():
        if out != hidden or width == hidden:
            continue
        for fused in (False, True):
            shape = (width * (1 + fused), hidden)
            made = [n for n, own in linears.items() if own == shape and n not in taken]
            near = [n for n in made if _parent(n) == _parent(down)]
            if made:
                yield near or made, down, fused
                taken |= {*(near or made)}
                break


def _rest(block: nn.Module, linears: Mapping[str, Shape], known: set[str]) -> dict[str, list[str]]:
    """By part of the block in which nothing else was found, its layers; all of a block where that
    is so of every part. Not of what chooses among experts."""
    parts: dict[str, list[str]] = {}
    for name in linears:
        part = name.partition(".")[0] if "." in name else ""
        parts.setdefault(part, []).append(name)
    touched = {name.partition(".")[0] if "." in name else "" for name in known}
    experts = {name.partition(".")[0] for name, _ in routed(block)}
    found = {part: names for part, names in parts.items() if part not in touched | experts}
    return found if known else {"": list(linears)} if linears and not experts else {}
