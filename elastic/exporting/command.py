"""From one sub-adapter to files on disk that were loaded again and compared before we say so."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from elastic.config import ExportConfig, TaskConfig
from elastic.config.latency import RoundedTo
from elastic.config.model import Dtype
from elastic.console import busy, say, track
from elastic.data import Example, Task, load_task
from elastic.errors import DataError, ExportError, RunError, require
from elastic.evaluation.evaluate import evaluate
from elastic.evaluation.statistics import CORRECT, Score
from elastic.exporting import foreign, probes, proof, push
from elastic.exporting.contract import Source, Which
from elastic.exporting.described import described
from elastic.exporting.every_size import EverySize
from elastic.exporting.merge import carrying, combine
from elastic.exporting.report import Model, Report
from elastic.exporting.targets import FORMATS
from elastic.exporting.write_only import write_only
from elastic.files import new_directory
from elastic.formats import hf
from elastic.formats.runner import runner_of
from elastic.latency.latency_table import read_timetable_of
from elastic.latency.runtime import timing_of
from elastic.models import loading
from elastic.models.modules import module_tree
from elastic.models.wrappers import auto_for
from elastic.plain import shaped
from elastic.provenance import provenance
from elastic.run import SCORES, Chosen, Run, waiting
from elastic.spaces.bound import SubAdapter
from elastic.spaces.uniform import nearest_uniform
from elastic.supernet.compact import compact
from elastic.supernet.cost import Counter, count
from elastic.supernet.examples import task_of
from elastic.supernet.held_out import HeldOut
from elastic.supernet.store import (
    load_run,
    read_about,
    read_factors,
)
from elastic.supernet.vocabulary import said_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export(config: ExportConfig) -> Report:
    """Write RUN/export/NAME in every format asked for, each checked against the supernet.

    All formats are written beside the target and take its place together, only after each was
    loaded in its own runtime and agreed; an earlier export of the same name stays otherwise.
    ExportError names the format and the largest difference. Another export from the run is waited
    for: they would spoil each other's times. With `push_to_hub` it goes to the hub then.
    """
    others = check(config)
    with waiting(Run(config.run).exports, "exports from it"):
        report = _export(config, others) if config.prove else write_only(config)
        return push.push(report) if config.push_to_hub else report


def check(config: ExportConfig) -> list[Path]:
    """All that can be refused before anything is made on the hub, waited for or computed; the
    folders of the adapters to be merged."""
    run = Run(config.run)
    base = run.config().model
    require(
        not config.hf.text_only or auto_for(loading.architecture_of(base)) is not None,
        f"hf.text_only: {base.path} is loaded as a model of text; leave it out",
    )
    for file in config.slices.tables:
        read_timetable_of(run, file)
    # The base itself is hashed, and held against this, when the run is loaded.
    digest = read_about(run.super_adapter)["base_digest"]
    others = [foreign.identify(entry.path, digest, base) for entry in config.merge.adapters]
    run.chosen(config.sub_adapter)
    for kind in config.kinds:
        FORMATS[kind].require()
    push.check(config, base.path)
    return others


def _export(config: ExportConfig, others: Sequence[Path]) -> Report:
    run = Run(config.run)
    trained = run.config()
    chosen = run.chosen(config.sub_adapter)
    if chosen.saved:
        shaped(chosen.saved, SCORES, f"{run.sub_adapters / chosen.name}.json")
    if chosen.compress and config.has_graphs and not config.compress:
        config = dataclasses.replace(config, compress=[cast(RoundedTo, chosen.compress)])
    for kind in config.kinds:
        FORMATS[kind].require()
    config = dataclasses.replace(config, timing=timing_of(config.timing, trained.model))
    task, config = _examples(run, config, chosen)
    # Written models are float32 unless the run was float64: parity is shown at that precision.
    dtype: Dtype = "float64" if trained.model.dtype == "float64" else "float32"
    wanted = dataclasses.replace(trained.model, dtype=dtype)
    _, base, net = load_run(run, dtype=dtype)
    name, sub = chosen.name, chosen.at(net.space, config.seed)
    inputs = [probes.inputs_of(base.model, base.tokenizer, example) for example in task.test[:4]]
    # Before anything is asked or timed: not until they are read is it known that they can be.
    updates = [
        dataclasses.replace(
            foreign.read(folder, wanted, base.digest, inputs), name=foreign.name_of(entry.path)
        )
        for folder, entry in zip(others, config.merge.adapters, strict=True)
    ]
    held_out = HeldOut.of(run, net, base.tokenizer, task, config.compensation)
    of_whom = chosen
    full_cost = Counter(net.model, net.space).full
    full = compact(net, net.space.maximal())
    instead_of = merge = None
    if chosen.recovery:
        net.load_factors(read_factors(run.factors_of(chosen)))
    if config.hf.uniform:
        made_up, cut = held_out.best(chosen, sub)
        # With others to be merged, its accuracy alone would say nothing.
        known = proof.Accuracy()
        if not others:
            known = _accuracy(_scored(chosen, sub), config, cut, base.tokenizer, task.test)
        can_say = said_by(net, base.tokenizer, sub, task.test)
        instead_of = Model(name, sub, known, count(cut), full_cost, made_up, can_say)
        sub = nearest_uniform(net.space, sub, lambda each: hf.is_plain(compact(net, each)))
        of_whom = Chosen(name)
        name = f"{name}-uniform"
        if chosen.recovery:
            net.load_factors(read_factors(run.super_adapter))
    name = f"{name}-merged" if others else name
    directory = run.export(config.name or name, sub, config.kinds)
    # What some formats write; the others have their head cut behind it.
    uncut = net.space.with_whole_vocabulary(sub)

    truth: dict[SubAdapter, list[probes.Probe]] = {}
    if others:
        # They are merged into what the supernet computes.
        made_up = held_out.chosen(of_whom, uncut)
        if made_up.sequential:
            say(f"{of_whom.name} was fitted to the full model, which says nothing of what is merged"
                ": it is merged as it was before")  # fmt: skip
        made_up = dataclasses.replace(made_up, sequential=False)
        with busy("merging"):
            whole, merge = combine(
                net, uncut, updates, config.merge, name=name, seed=config.seed,
                degree=made_up.degree,
            )  # fmt: skip
        if config.merge.strategy == "linear":
            with carrying(net, uncut, updates, config.merge, made_up.degree) as active:
                truth[uncut] = [probes.probe(active, ids) for ids in inputs]
            as_merged = probes.agreement(runner_of(whole), truth[uncut])
            probes.require_agreement("merge", as_merged, foreign.ROUNDING)
    else:
        made_up, whole = held_out.best(of_whom, uncut)
    model = whole if sub == uncut else net.cut_vocabulary_(module_tree(whole), sub)
    for point, each in ((sub, model), (uncut, whole)):
        if point not in truth:
            with net.active(point, made_up.degree) as active:
                # What was fitted, or merged, is in no supernet.
                asked = each if made_up.sequential or others else active
                probed = track(inputs, "asking the supernet")
                truth[point] = [probes.probe(asked, ids) for ids in probed]
    both: dict[Which, PreTrainedModel] = {"compact": model, "full": full}
    formats: dict[str, proof.Result] = {}
    with new_directory(directory) as building:
        # Beside what is kept: large, and gone with it when this process is killed.
        with tempfile.TemporaryDirectory(dir=building, prefix=".") as scratch:
            every_size = EverySize(
                run, net, held_out.best, of_whom, config.seed, config.slices.tables
            )
            source = Source(
                config, net, sub, both, base, wanted, FORMATS, Path(scratch), every_size, name,
                task.train,
            )  # fmt: skip
            if sub != uncut:
                all_tokens = {**both, "compact": whole}
                source.uncut = dataclasses.replace(
                    source, sub=uncut, models=all_tokens, folders={}, pipelines={}
                )
            samples = proof.samples(source, task.test)
            reasons = _reasons(source)
            for kind in config.kinds:
                if reason := reasons.get(kind):
                    formats[kind] = proof.Skipped(reason)
                    continue
                say(f"Writing and checking {kind}")
                own = source.of(kind)
                with busy(f"writing {kind}"):
                    own.write(kind, "compact", building / kind)
                with busy(f"checking {kind}"):
                    found = proof.prove(kind, own, building / kind, truth[own.sub], task.test)
                if own is not source:
                    told = {"whole_vocabulary": FORMATS[kind].why_whole_vocabulary(source)}
                    found = dataclasses.replace(found, about={**found.about, **told})
                formats[kind] = found
        proved = {kind: found for kind, found in formats.items() if isinstance(found, proof.Proof)}
        as_torch = {kind: found for kind, found in proved.items() if found.as_torch}
        saved = _scored(chosen, sub) if name == chosen.name else {}
        searched_as = loading.resolve_dtype(trained.model.dtype, model.device)
        kept = _kept(saved, len(task.test)) if searched_as == model.dtype else None
        scored = functools.cache(
            lambda model: evaluate(
                model, base.tokenizer, task.test, batch_tokens=config.batch_tokens,
                label=f"scoring the {'full' if model is full else 'compact'} model",
            )
        )  # fmt: skip
        trade: proof.Trade | None = None
        for kind, found in as_torch.items() if config.accuracy else ():
            own = source.of(kind).models["compact"]
            same = kept if own is model else None
            mine, theirs = same or (scored(own), scored(full))
            beside = proof.beside(theirs, mine)
            formats[kind] = dataclasses.replace(found, trade=beside)
            trade = beside if own is model else trade
        if trade is None:
            trade = proof.Trade(_accuracy(saved, config, model, base.tokenizer, task.test))
        # Without training examples those of the test are made up.
        can_say = said_by(net, base.tokenizer, sub, task.test) if task.train else None
        return described(
            building, run, config,
            directory=directory,
            base_digest=base.digest,
            model=Model(name, sub, trade.compact, count(model), full_cost, made_up, can_say),
            formats=formats,
            provenance=provenance(str(model.device)),
            samples=samples,
            recovery=chosen.recovery if of_whom is chosen else None,
            instead_of=instead_of,
            merge=merge,
        )  # fmt: skip


def _examples(run: Run, config: ExportConfig, chosen: Chosen) -> tuple[Task, ExportConfig]:
    """Of the run. Where they are gone, or others, and nothing is to be scored, fitted or chosen by
    them, made-up questions for the checks, and no scores."""
    try:
        return task_of(run), config
    except (DataError, RunError) as error:
        said = chosen.compensation
        undecided = said is None and config.compensation.is_on and chosen.name != "maximal"
        fitted = undecided or bool(said and said.get("sequential"))
        if config.accuracy or config.compress or config.hf.uniform or fitted:
            raise
        say(f"{error}. Nothing is scored, and the checks ask made-up questions")
        some = load_task(TaskConfig(train_examples=1, validation_examples=1), config.seed)
        return Task((), (), some.test[:4]), dataclasses.replace(config, runtime_examples=0)


def _reasons(source: Source) -> dict[str, str]:
    """Why formats that were asked for are not written; ExportError if none would be."""
    asked = source.config.kinds
    found = {kind: FORMATS[kind].why_not(source) for kind in asked}
    reasons = {kind: reason for kind, reason in found.items() if reason}
    if len(reasons) == len(asked):
        listed = "; ".join(f"{kind}: {reason}" for kind, reason in reasons.items())
        raise ExportError(f"nothing of {source.name} can be written so: {listed}")
    return reasons


def _scored(chosen: Chosen, sub: SubAdapter) -> Mapping[str, Any]:
    """What the search wrote, if it scored this very sub-adapter as it is."""
    saved = chosen.saved
    same = saved.get("sub_adapter") == sub.as_dict() and not saved.get("compress")
    return saved if same else {}


def _kept(saved: Mapping[str, Any], n: int) -> tuple[Score, Score] | None:
    """This one's and the full model's on the `n` test examples, where the search kept them."""
    mine, full = saved.get(CORRECT), saved.get(f"full_{CORRECT}")
    if not (isinstance(mine, str) and isinstance(full, str) and len(mine) == len(full) == n):
        return None  # an earlier version kept less
    return Score.of_marks(mine), Score.of_marks(full)


def _accuracy(
    saved: Mapping[str, Any],
    config: ExportConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    test: Sequence[Example],
) -> proof.Accuracy:
    """On the test split: the search's if it scored this sub-adapter, else measured now."""
    if saved:
        return proof.Accuracy(*(saved[key] for key in proof.Accuracy().as_dict()))
    if not config.accuracy:
        return proof.Accuracy()
    score = evaluate(model, tokenizer, test, batch_tokens=config.batch_tokens, label="scoring")
    return proof.Accuracy(**score.as_dict())
