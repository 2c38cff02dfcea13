"""What must hold before a base model is trained: checked without weights where that can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from elastic import distributed
from elastic.adapters import METHODS, Adapter
from elastic.config import TaskConfig, TrainConfig
from elastic.config.model import SCORE, of_earlier_version
from elastic.data import load_task
from elastic.data.answers import answer_logits
from elastic.data.collating import DIFFERENCE, IGNORED, collate, in_rows
from elastic.data.encoding import Encoded, padded
from elastic.data.labels import classes_in
from elastic.errors import ConfigError
from elastic.models import loading
from elastic.models.kinds import Kind
from elastic.run import Run
from elastic.spaces.bound import BoundSpace, SubAdapter
from elastic.supernet.discovery import space_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from elastic.supernet.supernet import Supernet


def refuse_sharded(config: TrainConfig) -> None:
    """ConfigError for what DeepSpeed and FSDP leave no place for.

    DeepSpeed clips, and takes the optimiser's step, inside its backward pass: one sub-adapter per
    step, and a regulariser is clipped with the task. FSDP and ZeRO 3 shard the factors that a
    regulariser needs whole.
    """
    sharding = distributed.sharding()
    method = config.adapter.resolved_method
    regularised = METHODS[method].penalty is not Adapter.penalty
    if sharding and regularised and distributed.shards_parameters():
        raise ConfigError(
            f"adapter.method {method} has a regulariser, which needs factors whole, and {sharding} "
            "shards them; use configs/accelerate/ddp.yaml or zero2.yaml"
        )
    clipped = sharding == "DeepSpeed" and config.max_grad_norm > 0
    if clipped and regularised and not METHODS[method].clip_penalty:
        raise ConfigError(
            f"max_grad_norm {config.max_grad_norm:g}: the regulariser of {method} is not to be "
            "clipped, and DeepSpeed clips all at once; give --max_grad_norm 0, or use "
            "configs/accelerate/ddp.yaml"
        )
    if sharding == "FSDP" and loading.resolve_device(config.model.device).type == "cpu":
        raise ConfigError(
            "FSDP: accelerate shards models on accelerators alone; on CPU processes use "
            "configs/accelerate/ddp.yaml"
        )
    if sharding == "DeepSpeed" and config.sampling == "sandwich":
        raise ConfigError("sampling: sandwich does not work with DeepSpeed; use DDP or FSDP")


def refuse_differing_depths(config: TrainConfig, bound: BoundSpace) -> None:
    """ConfigError where processes that gather every block together would run different ones."""
    sharding = distributed.sharding()
    if sharding and bound.depths and config.draw_for == "process":
        raise ConfigError(
            f"sample_each process: {sharding} gathers every block on all processes, which wait for "
            "each other forever where a depth differs; choose sample_each step"
        )


def as_begun(config: TrainConfig) -> TrainConfig:
    """The settings as they are, or with the draw and the templates of the run, or of the one to go
    on from, if an earlier version began it with the same ones: what it has trained stays apart from
    what it is tested on."""
    before = TaskConfig(**of_earlier_version(vars(config.task)))
    for path in filter(None, (config.run, config.start_from)):
        if Run(path).config_file.is_file() and Run(path).begun().task == before:
            return replace(config, task=before)
    return config


def with_classes(config: TrainConfig) -> TrainConfig:
    """The settings as they are, or with the classes named: those that the run began with, of the
    run to go on from, else what the data say."""
    if config.model.classes or loading.kind_of_base(config.model) is not Kind.CLASSIFIER:
        return config
    classes: list[str] = []
    for path in filter(None, (config.run, config.start_from)):
        if not classes and Run(path).config_file.is_file():
            classes = Run(path).begun().model.classes
    if not classes and loading.regresses(config.model):
        classes = SCORE
    classes = classes or classes_in(load_task(config.task, config.seed))
    return replace(config, model=replace(config.model, classes=classes))


def predecessor(config: TrainConfig) -> Run:
    """The finished run to continue from; ConfigError if it trained something else."""
    assert config.start_from is not None
    before = Run(config.start_from)
    theirs = before.config()
    for field in ("resolved_method", "rank", "scale"):
        mine, other = getattr(config.adapter, field), getattr(theirs.adapter, field)
        if mine != other:
            raise ConfigError(
                f"start_from: {before.path} was trained with adapter "
                f"{field.removeprefix('resolved_')} {other}, not {mine}; "
                "a sequence keeps one method, rank and scale"
            )
    if theirs.model.classes and not config.sub_adapter:
        raise ConfigError(
            f"start_from: {before.path} has a classification head, and a sequence of tasks is "
            "answered with text; give sub_adapter to train that one on"
        )
    if theirs.model.classes != config.model.classes:
        raise ConfigError(
            f"start_from: {before.path} tells {', '.join(theirs.model.classes) or 'no classes'} "
            f"apart, in this order, not {', '.join(config.model.classes) or 'none'}; set "
            "model.classes alike"
        )
    taken = theirs.adapter.taken_from  # then the space is of the layers that it has
    spaces = (space_for(config), before.space())
    # Which tokens stay is a question of the answers.
    if taken is None and len({s.with_whole_ranks().with_least(1).sections for s in spaces}) > 1:
        raise ConfigError(
            f"start_from: {before.path} was trained in another search space than {config.space}; "
            f"a sequence keeps one"
        )
    return before


@torch.no_grad()
def require_cut_head(net: Supernet, batch: dict[str, torch.Tensor]) -> None:
    """ConfigError for a vocabulary that cannot be cut, since the model's code computes something
    else behind its head."""
    if net.vocabulary is None or len(net.vocabulary.group.choices) < 2:
        return
    group, whole = net.vocabulary.group, net.space.maximal()
    cut = SubAdapter(tuple((whole.as_dict() | {group.name: group.choices[-1]}).items()))
    with net.active(whole):
        full = answer_logits(net.model, batch)[0]
    with net.active(cut):
        found = answer_logits(net.model, batch)[0]
    kept = net.vocabulary.tokens(group.choices[-1]).to(full.device)
    gone = torch.ones(full.shape[-1], dtype=torch.bool, device=full.device)
    gone[kept] = False
    change = float((found[..., kept] - full[..., kept]).norm() / full[..., kept].norm())
    if not change <= DIFFERENCE or not (found[..., gone] == -torch.inf).all():
        raise ConfigError(
            f"group {group.name!r}: {type(net.model).__name__} computes something behind its head, "
            "so that a cut one changes more than the tokens that are cut; leave the group out"
        )


@torch.no_grad()
def require_apart(model: PreTrainedModel, sequences: Sequence[Encoded], pad: int) -> None:
    """ConfigError when two sequences in one row are not what each is alone: the model's code looks
    beyond its own, or takes no positions."""
    pair = sorted(sequences, key=lambda sequence: len(sequence.ids))[:2]
    length = padded(sum(len(sequence.ids) for sequence in pair))
    found = []
    for batch in (in_rows(pair, [range(len(pair))], length, pad), collate(pair, pad)):
        logits, labels = answer_logits(model, {k: x.to(model.device) for k, x in batch.items()})
        found.append(logits[labels != IGNORED].float())
    together, alone = found
    change = float((together - alone).norm() / alone.norm())
    if not change <= DIFFERENCE:
        raise ConfigError(
            f"packing: {type(model).__name__} computes something else for a sequence that shares "
            f"its row (the logits differ by {change:.0%}); leave packing out"
        )
