"""A search space for a model nobody has written one for: what `elastic.supernet.structure` finds in
its modules is tried on tensors without data before it is believed.

A trial has a control: the model as it is runs first, in the type that it will run in. What fails
there is no cut's fault.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from elastic.config import AdapterConfig, ModelConfig, SpaceShowConfig, TrainConfig
from elastic.console import busy, logging_at, say, tabulate
from elastic.errors import ConfigError
from elastic.models import loading
from elastic.models.modules import modules_of
from elastic.models.wrappers import language_model, text_config
from elastic.plain import one_line
from elastic.spaces.declared import SearchSpace
from elastic.supernet.few import FEW, alike, without
from elastic.supernet.listed_experts import to_every_expert_
from elastic.supernet.structure import DEPTHS, Kind, kinds_of, routed
from elastic.supernet.supernet import Supernet
from elastic.supernet.wrapped import placed_in, require_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
AUTO, AUTO_DEEP = "auto", "auto-deep"
"""The space shipped for a type of model, or discovered; discovered, and with depths."""
RANK = 4
"""Of the factors that a cut is tried with."""


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
    none, the one discovered; of `auto-deep`, the one discovered with depths."""
    if config.space not in (AUTO, AUTO_DEEP):
        return placed_in(SearchSpace.load(config.space), config.model)
    model_type = text_config(loading.architecture_of(config.model)).model_type
    if config.space == AUTO and (shipped := shipped_for(model_type)):
        return placed_in(shipped, config.model)
    with busy("looking for what can be cut"):
        return discover(bare(config.model), deep=config.space == AUTO_DEEP)


def bare(config: ModelConfig) -> PreTrainedModel:
    """The model without memory, in the type that it will run in."""
    device = loading.resolve_device(config.device)
    return loading.skeleton(config, loading.resolve_dtype(config.dtype, device))


def shipped_for(model_type: str) -> SearchSpace | None:
    """The shipped space that was tested with this type of model; None if there is none."""
    name = next((name for name, types in KNOWN.items() if model_type in types), None)
    return SearchSpace.load(name) if name else None


def discover(model: PreTrainedModel, *, deep: bool = False) -> SearchSpace:
    """What can be elastic in any model of repeated blocks (meta tensors will do): a section for
    each kind of block, if `deep` with the number of those that run. Says what it found.

    ConfigError when no repeated block has a linear layer.
    """
    used = called(model)
    kinds = [kind for kind in kinds_of(model, used, language_model(model)) if kind.section["adapt"]]
    if not kinds:
        raise ConfigError(
            f"space auto: {type(model).__name__} repeats no block with linear layers; write a "
            "search space (see search_spaces/)"
        )
    declared = [kind.section for kind in kinds]
    if used is None or refusal(model, SearchSpace.from_dict(declared), RANK):
        declared = [_tried(model, section, runs=used is not None) for section in declared]
    declared = [_chosen(model, section) for section in declared]
    if deep:
        declared = [_deep(model, section) for section in declared]
    _tell(model, kinds, declared)
    return SearchSpace.from_dict(declared, "space auto")


def _tell(
    model: PreTrainedModel, kinds: Sequence[Kind], declared: Sequence[Mapping[str, Any]]
) -> None:
    """A row for each kind of block, and what stays whole."""
    rows = [
        (
            kind.blocks,
            str(kind.count),
            ", ".join(kind.parts),
            ", ".join(section["groups"]),
        )
        for kind, section in zip(kinds, declared, strict=True)
    ]
    title = f"Space of {type(model).__name__}"
    tabulate(title, ("blocks", "number", "found in them", "elastic"), rows)
    if experts := list(dict.fromkeys(name for kind in kinds for name in kind.experts)):
        say(f"Space auto: {', '.join(experts)} are neither adapted nor cut; their weights are no "
            "linear layers")  # fmt: skip
    if mixed := list(dict.fromkeys(name for kind in kinds for name in kind.mixtures)):
        say(f"Space auto: {', '.join(mixed)} are not adapted; a space that names their matrices in "
            "adapt does that (moe-factors)")  # fmt: skip
    if mixers := list(dict.fromkeys(name for kind in kinds for name in kind.mixers)):
        say(f"Space auto: of {', '.join(mixers)} ranks alone are elastic; their convolutions and "
            "states count on their inner sizes")  # fmt: skip


def _tried(model: PreTrainedModel, section: dict[str, Any], *, runs: bool) -> dict[str, Any]:
    """The section without the groups whose cut the model's code does not follow, as far as it
    `runs` uncut."""
    kept = {name: spec for name, spec in section["groups"].items() if spec["dim"] == "rank"}
    for name, spec in section["groups"].items():
        if spec["dim"] == "rank":
            continue
        alone = SearchSpace.from_dict({**section, "groups": {name: spec}}, "space auto")
        reason = refusal(model, alone, RANK)
        if reason and not runs:
            reason = "uncut, the model does not run without data, so that no cut can be tried"
        if reason:
            _leave_out(name, section, reason)
        else:
            kept[name] = spec
    return {**section, "groups": kept}


def _chosen(model: PreTrainedModel, section: dict[str, Any]) -> dict[str, Any]:
    """The section without the groups that have one size alone."""
    bound = SearchSpace.from_dict(section, "space auto").bind(model, RANK)
    several = {group.name.rpartition(".")[2] for group in bound if len(group.choices) > 1}
    kept = {}
    for name, spec in section["groups"].items():
        if name in several or spec["dim"] == "rank":
            kept[name] = spec
        else:
            _leave_out(name, section, "there is one size alone to choose from")
    return {**section, "groups": kept}


def _deep(model: PreTrainedModel, section: dict[str, Any]) -> dict[str, Any]:
    """The section with a depth, where the model can be described without some of its blocks."""
    depth = {"depth": {"dim": "depth", "choices": DEPTHS}}
    alone = SearchSpace.from_dict({**section, "groups": depth}, "space auto")
    try:
        [bound] = alone.bind(model, RANK)
    except ConfigError as error:
        _leave_out("depth", section, str(error))
        return section
    if len(bound.choices) < 2:
        _leave_out("depth", section, "there is one size alone to choose from")
        return section
    return {**section, "groups": depth | section["groups"]}


def _leave_out(name: str, section: Mapping[str, Any], reason: str) -> None:
    say(f"Space auto leaves out {name} of {section['blocks']}: {reason}")


def require_fits(model: PreTrainedModel, space: SearchSpace, rank: int) -> None:
    """ConfigError for a space whose smallest sub-adapter the model cannot run, a layer left out of
    a group, say, or whose factors would do nothing. Nothing is said of a model whose code needs
    values, and runs at no size."""
    used, bound = called(model), space.bind(model, rank)
    require_text(model, bound, space.source)
    if used is None:
        return
    linear = (site for site in bound.targets if not bound.experts_of(site))
    idle = next((site for site in linear if site not in used), None)
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
    """Names of the linear layers that are called and answer with what they make, and nothing
    besides; None if the model does not run without data. ConfigError if its own code refuses two
    tokens, in training or out of it, with what that says."""
    names: set[str] = set()

    def tell(name: str, layer: nn.Linear, output: Any) -> None:
        if isinstance(output, Tensor) and output.shape[-1] == layer.out_features:
            names.add(name)

    with _without_data(model) as (empty, inputs):
        for name, layer in modules_of(empty, nn.Linear):
            layer.register_forward_hook(lambda layer, _, y, name=name: tell(name, layer, y))
        kinds = alike(empty)
        reason, training = (_fails(empty.train(on), inputs, kinds) for on in (False, True))
        for words in (reason, training):
            if words and words.startswith(ValueError.__name__):  # of code that has looked
                raise ConfigError(
                    f"{type(model).__name__} does not run on two tokens and nothing else; its own "
                    f"code says {words}"
                )
        if reason:
            return None
    for kind in kinds:
        for first in kind[:FEW]:
            own = [name for name in names if name.startswith(f"{first}.")]
            names.update(name.replace(first, other, 1) for name in own for other in kind)
    return names


def refusal(model: PreTrainedModel, space: SearchSpace, rank: int) -> str | None:
    """Why the smallest sub-adapter, of factors of this rank, does not fit together; None if it
    does."""
    with _without_data(model) as (empty, inputs):
        try:
            net = Supernet(empty, space, AdapterConfig(rank=rank), start=False)
            net.activate(net.space.minimal())
        except Exception as error:  # whatever the model's code says
            return _told(error)
        return _fails(empty, inputs, alike(empty))


def _fails(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], kinds: Sequence[Sequence[str]]
) -> str | None:
    """Why a model does not run; None if it does, at least with a few blocks of these kinds. Where
    that fails it runs whole: its code may count on all of them."""
    reason = None
    for left_out in ([name for kind in kinds for name in kind[FEW:]], []):
        try:
            with without(model, left_out):
                model(**inputs)
            return None
        except Exception as error:  # whatever the model's code says
            reason = _told(error)
        if not left_out:
            break
    return reason


def _told(error: Exception) -> str:
    if isinstance(error, ValueError):  # others add whole listings of what was computed
        return f"{type(error).__name__}: {one_line(error)}"
    return f"{type(error).__name__}: {error}".splitlines()[0]


@contextlib.contextmanager
def _without_data(model: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, dict[str, Tensor]]]:
    """A copy of a model (meta tensors will do) on tensors without data, and inputs for it."""
    log = logging_at("torch._subclasses.fake_tensor", logging.CRITICAL)  # failures are asked for
    # Some classes make a tensor of a number while they are built.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), log:
        memory = {}
        for tensor in (*model.parameters(), *model.buffers()):
            bare = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            memory[id(tensor)] = nn.Parameter(bare, False) if is_parameter else bare
        inputs = {"input_ids": torch.zeros((1, 2), dtype=torch.int64)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        empty = copy.deepcopy(model, memory).eval()  # some leave blocks out at random in training
        for config in (empty.config, text_config(empty.config)):  # training does not cache, either
            config.use_cache = False
        empty.set_attn_implementation("eager")  # fused kernels do not look at shapes without data
        if any(routed(empty)):  # one of their kernels knows one type, another looks at values
            empty.set_experts_implementation("batched_mm")
        to_every_expert_(empty)
        yield empty, inputs
