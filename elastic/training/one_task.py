"""From settings to a super-adapter directory: check, load, build or continue, train, save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from elastic import distributed
from elastic.adapters import check
from elastic.config import CompensationConfig, TrainConfig
from elastic.console import busy, say, track
from elastic.data.answers import answer_logits
from elastic.data.collating import collated
from elastic.data.encoding import Encoded
from elastic.data.vocabulary import TokenOrder
from elastic.errors import ConfigError, DataMissing, require
from elastic.files import named_failure, write_json
from elastic.models import loading, requirements
from elastic.run import Run
from elastic.spaces.bound import BoundSpace, readable
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compensation import Compensation
from elastic.supernet.discovery import bare, require_fits, space_for
from elastic.supernet.held_out import Compensated, HeldOut
from elastic.supernet.importance import channel_order
from elastic.supernet.moments import Moments, calibrated, save
from elastic.supernet.store import (
    read_factors,
    read_order,
    read_super_adapter,
    save_super_adapter,
    saved_compensation,
)
from elastic.supernet.summary import vocabulary_told
from elastic.supernet.supernet import Supernet
from elastic.training import adopted
from elastic.training.callbacks import check_trackers
from elastic.training.checks import (
    as_begun,
    predecessor,
    refuse_differing_depths,
    refuse_sharded,
    require_apart,
    require_cut_head,
    with_classes,
)
from elastic.training.material import Material, require_unmoved
from elastic.training.schedule import Schedule, examples_per_step
from elastic.training.trainer import fit, frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WATCHED = 16
"""Validation examples on which the losses of three sub-adapters are compared over time."""
PROBE = 2
"""Examples on which the model with its channels in order is compared with the base."""
CHANGE = 0.1
"""Of the logits, in norm, that rounding may explain in any type."""


def train_one(config: TrainConfig) -> Run:
    """Train as configured and write RUN/super_adapter; returns the run.

    Space, data and run directory are checked before weights are read. A run of the same
    configuration is resumed from its last checkpoint, or returned as it is when finished; one that
    another process trains is waited for.
    """
    run = Run(config.run)
    with run.alone():
        return _train_alone(run, config)


def _train_alone(run: Run, config: TrainConfig) -> Run:
    config = with_classes(as_begun(config))
    taken = config.adapter.taken_from
    if taken:
        config = adopted.as_taken(config)
    with distributed.main_first():
        finished = run.claim(config)
    if finished:
        if distributed.is_main():
            run.clear()
        with distributed.main_first():
            try:
                if run.data.is_file():  # an earlier version kept none
                    require_unmoved(run, config)
            except DataMissing as error:
                say(f"Its data cannot be looked at: {error}")
        say(f"{run.path}: already trained; nothing to do")
        return run
    check_trackers(config.report_to)
    loading.usable_device(config.model.device)
    refuse_sharded(config)
    before = predecessor(config) if config.start_from else None
    space = before.space() if before else adopted.adapted(space_for(config), config)
    require(
        config.vocab.text is None or space.cuts_vocabulary,
        f"vocab.text: {space.source} has no group of dim vocab; leave it out, or choose another "
        "space",
    )
    requirements.require_training(config.model)
    if config.packing:
        requirements.require_packing(config.model)
    with busy("trying the space on the model"):
        skeleton = bare(config.model)
        bound = space.bind(skeleton, config.adapter.rank)
        check(config.adapter, skeleton, bound)
        if not before:  # else it has trained there
            require_fits(skeleton, space, config.adapter.rank)
    refuse_differing_depths(config, bound)
    only = chosen = None
    if before and config.sub_adapter:
        order = read_order(before.super_adapter, bound)
        chosen = before.chosen(config.sub_adapter)
        only = chosen.at(bound.ordered(order))
    material = Material.of(config, skeleton)
    material.require_same(run)
    task, encoded = material.task, material.encoded
    if only and (head := bound.vocabulary):
        material.require_sayable(order[head.name][: only[head.name]])
    tokens = None
    if bound.vocabulary and not only:
        stay = kept_before(before, bound)
        tokens = material.token_order(config, skeleton, bound.vocabulary.choices[0], stay)
        space = space.with_least(tokens.least)
        say(vocabulary_told(space.bind(skeleton, config.adapter.rank), tokens.least))
    with distributed.main_first():
        run.begin(config)
    material.tell(skeleton)

    say(f"Loading {config.model.path}")
    with distributed.main_first():  # a packaged model is converted once
        base = loading.load(config.model, config.seed)

    with distributed.main_first():
        material.keep(run, base.digest)
        run.move(config)
    pad = base.tokenizer.pad_token_id
    examples, watched = encoded["train"], encoded["validation"][:WATCHED]
    if config.packing:
        require_apart(base.model, examples, pad)
    if before:
        net = continued(base, space, config, before, tokens)
    else:
        known = adopted.factors_of(base, config) if taken else None
        net = build(
            base.model, space, config, calibration=examples, pad=pad, known=known, tokens=tokens
        )
    made_up, teacher = Compensated(), None
    if before and only and chosen:
        teacher = frozen(net) if config.distill else None
        if chosen.recovery:
            net.load_factors(read_factors(before.factors_of(chosen)))
        with distributed.main_first():  # the moments of an earlier version's run are saved once
            held_out = HeldOut.of(before, net, base.tokenizer, task, CompensationConfig())
        # Of one process, as an order is. Training goes on in the supernet.
        made_up = distributed.shared(lambda: held_out.chosen(chosen, only))
        made_up = replace(made_up, sequential=False)
    calibration = examples[: config.compensation_examples]
    if config.compensation_in_training:
        made_up = Compensated(config.compensation_in_training)
        with distributed.main_first():
            net.compensation = _compensation_to_train_with(run, net, calibration, config, pad)
    what = "one sub-adapter" if only else f"{readable(net.space.size)} sub-adapters in one"
    about: dict[str, Any] = {"seed": config.seed, "steps": 0, **adopted.origin(config)}
    factors, sharded = None, False
    if taken:
        say(f"Taken over from {taken}: {what}, nothing to train")
    else:
        schedule = Schedule.of(config, len(examples), distributed.count())
        say(
            f"Training {what}: {schedule.steps} steps of "
            f"{examples_per_step(config, distributed.count())} examples, "
            f"{str(base.model.dtype).removeprefix('torch.')} on {base.model.device}"
        )
        with named_failure(run.checkpoints):
            trainer = fit(
                net, config, schedule, examples, run, pad=pad,
                only=only and net.space.with_whole_vocabulary(only),
                teacher=teacher, degree=made_up.degree, watched=watched,
            )  # fmt: skip
        factors, sharded = trainer.factors(), trainer.is_sharded
        rate = schedule.learning_rate(schedule.steps - 1)
        about |= {"steps": schedule.steps, "learning_rate": rate}
    moments: Mapping[str, torch.Tensor] = {}
    if only or config.compensation_in_training:  # it has learnt to live with these
        moments = net.compensation.moments if net.compensation else {}
    elif distributed.is_main() and not sharded:
        moments = calibrated(net, calibration, batch_size=config.batch_size, pad=pad)
    with distributed.main_first():
        if distributed.is_main():
            if only:
                chosen_one = {"sub_adapter": only.as_dict(), "compensation": made_up.as_dict()}
                write_json(run.sub_adapter, chosen_one)
            save_super_adapter(
                net, run.super_adapter, factors=factors, moments=moments, model=config.model,
                base_digest=base.digest, **about,
            )  # fmt: skip
            run.clear()
    return run


def _compensation_to_train_with(
    run: Run, net: Supernet, examples: list[Encoded], config: TrainConfig, pad: int
) -> Compensation:
    """From a calibration pass before training, which a resumed run finds again."""
    if not run.moments.is_file():
        save(calibrated(net, examples, batch_size=config.batch_size, pad=pad), run.moments)
    return Compensation(Moments(run.moments), device=net.device)


def build(
    model: PreTrainedModel,
    space: SearchSpace,
    config: TrainConfig,
    *,
    calibration: list[Encoded],
    pad: int,
    known: adopted.Factors | None = None,
    tokens: TokenOrder | None = None,
) -> Supernet:
    """The supernet at the start of training, its channels ordered, or with factors that are known;
    its tokens as given. ConfigError for a space or a method that does not fit the model."""
    bound = space.bind(model, config.adapter.rank)
    examples = calibration[: config.order_examples]
    batches = [*collated(examples, config.batch_size, pad, model.device)]
    whole = model if known is None else adopted.as_one(model, known)
    if config.resolved_order == "activation":
        say(f"Ordering channels by activation on {len(examples)} training examples")
    # Of one process: another device may round another way, and ties break either way.
    order = distributed.shared(
        lambda: channel_order(whole, bound, config.resolved_order, track(batches, "ordering"))
    )
    if bound.vocabulary and tokens:
        order |= {bound.vocabulary.name: tokens.tokens}
    settings: dict[str, Any] = {"order": order, "seed": config.seed}
    batch = next(collated(calibration[:PROBE], PROBE, pad, model.device))
    if known is None and config.resolved_order == "none":
        net = Supernet(model, space, config.adapter, **settings)
        require_cut_head(net, batch)
        return net
    before = _logits(whole, batch)
    net = Supernet(model, space, config.adapter, **settings, start=known is None)
    if known is not None:
        adopted.load_(net, known)
    require_unchanged(before, _logits(net.model, batch), space)
    require_cut_head(net, batch)
    return net


def require_unchanged(before: torch.Tensor, after: torch.Tensor, space: SearchSpace) -> None:
    """ConfigError where logits before and after channels were put in order differ by more than
    rounding."""
    change = float((after - before).norm() / before.norm())
    if not change <= CHANGE:
        raise ConfigError(
            f"{space.source}: putting the important channels first changed what the model "
            f"computes, by {change:.0%}: some group does not name all layers that share its "
            "channels, or the model's code mixes them"
        )


@torch.no_grad()
def _logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """At the answers, float32."""
    return answer_logits(model, batch)[0].float()


def kept_before(before: Run | None, bound: BoundSpace) -> list[int]:
    """Tokens that the answers of the run to go on from need."""
    if before is None or bound.vocabulary is None:
        return []
    order = read_order(before.super_adapter, bound)[bound.vocabulary.name]
    return [int(token) for token in order[: before.space().least]]


def continued(
    base: loading.Base,
    space: SearchSpace,
    config: TrainConfig,
    before: Run,
    tokens: TokenOrder | None = None,
) -> Supernet:
    """The supernet in which the next task begins, with the order of its tokens, or in which one
    sub-adapter goes on with its own; BaseMismatch on another base model."""
    read_super_adapter(before.super_adapter, base.digest)
    bound = space.bind(base.model, config.adapter.rank)
    order, factors = read_order(before.super_adapter, bound), read_factors(before.super_adapter)
    if bound.vocabulary and tokens:
        order[bound.vocabulary.name] = tokens.tokens
    net = Supernet(base.model, space, config.adapter, order=order, start=False)
    if config.sub_adapter:
        net.load_factors(factors)
        net.compensation = saved_compensation(before.super_adapter, net)
    else:
        net.succeed(factors, config.seed)
    return net
