"""`elastic search` and `elastic export`, with what `--recover STEPS` does to what they choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from elastic.config import ExportConfig, SearchConfig
from elastic.files import write_json
from elastic.recovery.recover import Asked, recover
from elastic.run import Run, waiting
from elastic.searching import study
from elastic.searching.finalists import COMPENSATION, best_of
from elastic.searching.front import Front, Member
from elastic.searching.page import write_page
from elastic.spaces.bound import Candidate
from elastic.supernet.examples import task_of
from elastic.supernet.held_out import HeldOut
from elastic.supernet.store import load_run

if TYPE_CHECKING:
    from elastic.exporting.report import Report


def search(config: SearchConfig) -> Front:
    """Search, and with `recover` train the front on, score it again and choose the best one anew;
    as `elastic.searching.study.search` otherwise."""
    front = study.search(config)
    if not config.recover.steps:
        return front
    members = front.members
    asked = [
        Asked(one.name, one.candidate, one.made_up, _known(one, front.full.accuracy_n))
        for one in members
    ]
    entries = recover(front.run, asked, config)
    again = [_judged_again(*pair) for pair in zip(members, entries, strict=True)]
    measured = [member.measured for member in again]
    best = best_of(again, measured, front.costs[0], front.limits)
    again = [replace(one, best=number == best) for number, one in enumerate(again, 1)]
    front = replace(front, members=again)
    with waiting(front.run.search, "writes its front"):
        front.save()
        write_page(front)
    return front


def _known(member: Member, examples: int) -> dict[str, Any]:
    """What the search has asked already: not validation, if it stopped asking early."""
    known = {name: value for name, value in member.test.items() if name != COMPENSATION}
    if member.figures.accuracy_n == examples:
        known["validation_accuracy"] = member.figures.accuracy
    return known


def _judged_again(member: Member, entry: Mapping[str, Any]) -> Member:
    if not entry["taken"]:
        return replace(member, recovery=entry)
    after = entry["after"]
    gain = after["validation_accuracy"] - entry["before"]["validation_accuracy"]
    return replace(
        member,
        figures=replace(member.figures, accuracy=after["validation_accuracy"]),
        # On the same examples, whose noise the estimate has lost already.
        estimate=min(1.0, max(0.0, member.estimate + gain)),
        # What its head can say is as before.
        test={name: after.get(name, value) for name, value in member.test.items()},
        recovery=entry,
    )


def export(config: ExportConfig) -> Report:
    """Export, with `recover` what the sub-adapter is after further training if held-out examples
    say that it is better; as `elastic.exporting.command.export` otherwise."""
    from elastic.exporting import command as exporting  # a search does without

    if not config.recover.steps:
        return exporting.export(config)
    run = Run(config.run)
    exporting.check(config)
    asked = _asked(run, config)
    [entry] = recover(run, [asked], config)
    now = entry["after" if entry["taken"] else "before"]
    file = run.recovered / entry["folder"] / f"{asked.name}.json"
    known = {COMPENSATION: now[COMPENSATION], "recovery": entry}
    write_json(file, {**asked.candidate.as_dict(), **known})
    return exporting.export(replace(config, sub_adapter=str(file)))


def _asked(run: Run, config: ExportConfig) -> Asked:
    """As it would be exported without."""
    chosen = run.chosen(config.sub_adapter)
    if chosen.recovery:  # by the search
        before = chosen.recovery["before"][COMPENSATION]
        chosen = replace(chosen, compensation=before, recovery=None)
    _, base, net = load_run(run)
    task = task_of(run)
    sub = chosen.at(net.space, config.seed)
    held_out = HeldOut.of(run, net, base.tokenizer, task, config.compensation)
    made_up = held_out.chosen(chosen, sub)
    if chosen.compensation is None:
        made_up, _ = held_out.refined(sub, made_up)
    return Asked(chosen.name, Candidate(sub, chosen.compress), made_up, {})
