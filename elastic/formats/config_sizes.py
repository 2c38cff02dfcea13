"""What the configuration of a model's class can say of its sizes: one for all layers, or others for
single layers, in the words that transformers has for that since 5.15."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn

from elastic.models.modules import linear_, meta, modules_of
from elastic.models.wrappers import text_config, wraps
from elastic.spaces.dims import QUERIES
from elastic.spaces.mixtures import mixtures

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff")
"""What configs call the width of the MLP; unset, it is four times the hidden size."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What they call the number of experts."""
EXPERT_WIDTHS = ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
"""What they call the width of each."""


def shapes_of(model: PreTrainedModel) -> dict[str, list[int]]:
    """[out, in] of every linear layer."""
    return {name: list(layer.weight.shape) for name, layer in modules_of(model, nn.Linear)}


def expert_sizes(model: PreTrainedModel) -> dict[str, list[int]]:
    """[experts, channels of each] of every module of experts."""
    return {each.experts: [each.all_experts, each.width] for each in mixtures(model)}


def tensor_sizes(
    model: PreTrainedModel, plain: PreTrainedModel
) -> tuple[dict[str, list[int]], dict[str, dict[str, int]]]:
    """Of a model whose experts differ in size from the `plain` one's: shapes by tensor of experts
    and routers, and by module attributes that say how many there are, and how wide."""
    shapes: dict[str, list[int]] = {}
    says: dict[str, dict[str, int]] = {}
    sizes = expert_sizes(model)
    for whole in mixtures(plain):
        if sizes[whole.experts] == [whole.all_experts, whole.width]:
            continue
        names = [f"{whole.experts}.{held.name}" for held in whole.tensors]
        names += [f"{whole.router}.{row.name}" for row in whole.rows]
        names += [held.name for held in whole.beside if whole.router]
        for name in names:
            site, _, leaf = name.rpartition(".")
            shapes[name] = list(getattr(model.get_submodule(site), leaf).shape)
        for name, key in (*whole.counted, *whole.measured):
            says.setdefault(name, {})[key] = getattr(model.get_submodule(name), key)
    return shapes, says


def uniform_sizes(
    model: PreTrainedModel, changed: Mapping[str, list[int]], expected: Mapping[str, list[int]]
) -> dict[str, int] | None:
    """Config values under which the family's own class has these sizes; None if there are none."""
    if not changed:
        return {}
    if text_config(model.config).is_heterogeneous:  # it has no size for all layers
        return None
    found = _named_sizes(model, changed, expected, query_groups(model))
    # Where layers differ in size, no one value fits them all.
    return found if _sizes_under(model, found) == _sizes_of(model) else None


def layer_words(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """`per_layer_config`: by number of a layer, config values under which the family's own class
    would give it its sizes. Nothing where there are none for one of them."""
    if model.config.is_encoder_decoder or model.config.is_heterogeneous or wraps(model.config):
        return {}  # of two stacks it says nothing; and of some families it has more to say
    own, groups = _sizes_of(model), query_groups(model)
    shapes = {**shapes_of(model), **expert_sizes(model)}
    plain = linear_(meta(type(model), model.config))
    expected = {**shapes_of(plain), **expert_sizes(plain)}
    changed = {name: size for name, size in shapes.items() if size != expected[name]}
    words: dict[str, dict[str, int]] = {}
    known: dict[Any, dict[str, Any] | None] = {}
    for layer in dict.fromkeys(map(_layer_of, changed)):
        mine = {name: size for name, size in changed.items() if _layer_of(name) == layer}
        shared = {name: count for name, count in groups.items() if _layer_of(name) == layer}
        values = _named_sizes(model, mine, expected, shared)
        if (key := tuple(values.items())) not in known:
            known[key] = _sizes_under(model, values)
        found = known[key]
        if found is None or layer is None:
            return {}
        if any(found[name] != own[name] for name in own if _layer_of(name) == layer):
            return {}
        words[layer.rpartition(".")[2]] = values
    config = copy.deepcopy(model.config)
    try:
        config.per_layer_config = words
        config.validate()
    except (StrictDataclassError, RuntimeError):  # Llama's asks how many heads all layers have
        return {}
    return words


def _layer_of(name: str) -> str | None:
    """The layer that a module of this name is in, with its stack's name before its number."""
    found = re.match(r"(.+?\.\d+)\.", name)
    return found and found[1]


def _named_sizes(
    model: PreTrainedModel,
    changed: Mapping[str, list[int]],
    expected: Mapping[str, list[int]],
    groups: Mapping[str, int],
) -> dict[str, int]:
    """What a config would say if these layers had other sizes than expected."""
    found: dict[str, int] = {}
    experts = expert_sizes(model)
    for name, (rows, columns) in changed.items():
        if name in experts:
            found |= _named_experts(model, expected[name], [rows, columns])
        elif columns != expected[name][1]:
            found |= _named_size(model, expected[name][1], columns, set(groups.values()))
    return found


def _sizes_of(model: PreTrainedModel) -> dict[str, Any]:
    """Shapes of parameters, sizes of experts and query groups of attention modules, by name: one
    word of a config may say the size of more than what is cut, as of fused experts beside a shared
    one."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    return {**shapes, **expert_sizes(model), **query_groups(model)}


def _sizes_under(model: PreTrainedModel, values: Mapping[str, int]) -> dict[str, Any] | None:
    """Those of the family's own class with these values in its config; None where it refuses."""
    config = copy.deepcopy(model.config)
    text = text_config(config)
    for name, size in values.items():
        setattr(text, name, size)
    try:
        text.validate()
    except StrictDataclassError:  # some classes want the hidden size to be a multiple of the heads
        return None
    return _sizes_of(linear_(meta(type(model), config)))


def _named_experts(
    model: PreTrainedModel, before: Sequence[int], after: Sequence[int]
) -> dict[str, int]:
    """What a config would say if experts were `after`, [number, width], instead of `before`."""
    found = {}
    for names, old, new in zip((EXPERTS, EXPERT_WIDTHS), before, after, strict=True):
        name = next(
            (name for name in names if getattr(text_config(model.config), name, None) == old), None
        )
        if name and new != old:
            found[name] = new
    return found


def _named_size(
    model: PreTrainedModel, before: int, after: int, groups: Collection[int]
) -> dict[str, int]:
    """What a config would say if the layers that read `before` channels read `after`."""
    config = text_config(model.config)
    for name in WIDTHS:
        if hasattr(config, name) and (getattr(config, name) or 4 * config.hidden_size) == before:
            return {name: after}
    head_size = getattr(config, "head_dim", None)
    if head_size and config.num_attention_heads * head_size == before:
        heads = after // head_size
        found = {"num_attention_heads": heads}
        if len(groups) == 1:
            found["num_key_value_heads"] = heads // next(iter(groups))
        return found
    return {}


def query_groups(model: PreTrainedModel) -> dict[str, int]:
    """By attention module, how many query heads share a key-value head."""
    modules = model.named_modules()
    return {name: getattr(module, QUERIES) for name, module in modules if hasattr(module, QUERIES)}
