"""The report of an export: that what was written is what was trained, and what it is worth beside
the full model. As tables, as Markdown and as one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

from elastic.config import ExportConfig, TimingConfig, TrainConfig
from elastic.console import wide
from elastic.data.vocabulary import Sayable
from elastic.exporting.pieces import Said, Table
from elastic.exporting.proof import Accuracy, Proof, Result, Sample, Skipped, Trade, Unproved
from elastic.latency.measure import distrust
from elastic.run import as_plain
from elastic.spaces.bound import SubAdapter
from elastic.supernet.cost import Cost
from elastic.supernet.held_out import SEQUENTIAL, Compensated

LONGEST = 160
"""Characters of a prompt that are shown, its last ones."""


@dataclass(frozen=True)
class Model:
    """A sub-adapter as a model of its own, and what it costs beside the full one."""

    name: str
    sub: SubAdapter
    accuracy: Accuracy
    """On the test split."""
    cost: Cost
    full_cost: Cost
    made_up: Compensated
    sayable: Sayable | None = None
    """Of the test answers; None where its head computes all tokens, or nobody asked."""

    def as_dict(self) -> dict[str, Any]:
        named = {"name": self.name, "sub_adapter": self.sub.as_dict(),
                 "compensation": self.made_up.as_dict()}  # fmt: skip
        full = {f"full_{name}": value for name, value in vars(self.full_cost).items()}
        known = {"vocabulary": self.sayable.as_dict()} if self.sayable else {}
        return {**named, **self.accuracy.as_dict(), **vars(self.cost), **full, **known}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written, and proof that it is what was trained."""

    directory: Path
    model: Model
    config: ExportConfig
    trained: TrainConfig
    formats: Mapping[str, Result]
    origin: Mapping[str, Any]
    """As `Run.origin` has it."""
    license: str | None
    """Of the base model."""
    base_digest: str
    provenance: Mapping[str, Any]
    """As `elastic.provenance` has it."""
    samples: Sequence[Sample] = ()
    recovery: Mapping[str, Any] | None = None
    """What became of the sub-adapter when it was trained on, as `elastic.recovery` has it."""
    instead_of: Model | None = None
    """The sub-adapter whose place a uniform one takes."""
    merge: Mapping[str, Any] | None = None
    """What became of other adapters, as `merge.combine` has it."""
    url: str | None = None
    """Where it lies on the hub, too."""

    @property
    def proved(self) -> dict[str, Proof]:
        """The formats that were written, and run here."""
        return {name: found for name, found in self.formats.items() if isinstance(found, Proof)}

    @property
    def paths(self) -> dict[str, str]:
        """Where each written format lies."""
        written = (name for name, found in self.formats.items() if not isinstance(found, Skipped))
        return {name: str(self.directory / name) for name in written}

    @property
    def contents(self) -> dict[str, Any]:
        """What report.json says."""
        instead = {"instead_of": self.instead_of.as_dict()} if self.instead_of else {}
        merge = {"merge": self.merge} if self.merge else {}
        recovery = {"recovery": self.recovery} if self.recovery else {}
        paths = {name: {"path": path} for name, path in self.paths.items()}
        return {
            "verdict": verdict(self.formats),
            **self.model.as_dict(),
            **recovery,
            **instead,
            **merge,
            "timing": as_plain(self.config.timing),
            "formats": {
                name: {**paths.get(name, {}), **found.as_dict()}
                for name, found in self.formats.items()
            },
            "samples": [sample.as_dict() for sample in self.samples],
            **self.origin,
            "license": self.license,
            "base_digest": self.base_digest,
            "seed": self.config.seed,
            **self.provenance,
        }

    def show(self) -> None:
        console = wide(110)
        for part in self._parts():
            shown = part if isinstance(part, str) else part.rich()
            console.print(shown, highlight=False)
        for path in self.paths.values():
            print(path)
        pushed = {}
        if self.url:
            print(self.url)
            pushed = {"hub": self.url}
        print(json.dumps({"report": str(self.directory / "report.json"), **pushed}))

    def markdown(self) -> str:
        parts = (part if isinstance(part, str) else part.markdown() for part in self._parts())
        return "\n\n".join(parts) + "\n"

    def _parts(self) -> Iterator[str | Table | Said]:
        """Lines and tables, in order."""
        model, proved = self.model, self.proved
        yield verdict(self.formats)
        yield (
            f"Sub-adapter {model.name}: {model.cost.params / 1e6:.1f} M of "
            f"{model.full_cost.params / 1e6:.1f} M parameters, "
            f"{model.cost.macs / model.full_cost.macs:.0%} of the operations per token"
        )
        if model.sayable:
            yield f"Its head knows {model.sayable}; what cannot be said is never right"
        if model.made_up != Compensated():
            yield _made_up(model.made_up)
        if self.recovery:
            yield _recovered(self.recovery)
        if model.accuracy.told:
            yield f"{model.accuracy.told} the search never saw"
        if self.instead_of:
            yield _instead_of(self.instead_of, model)
        if self.merge:
            yield from _merge(self.merge)
        if proved:
            yield from trades(proved, self.config.timing)
            fitted = self.model.made_up.sequential
            yield _agreement(proved, "the fitted model in torch" if fitted else "the supernet")
            for number, sample in enumerate(self.samples):
                yield _said(sample, {name: each.texts[number] for name, each in proved.items()})
        for name, found in self.formats.items():
            if isinstance(found, Skipped):
                yield f"{name}: not written: {found.skipped}"
            if isinstance(found, Unproved):
                filled = _filled(found.about.get("padding", {}), model.cost.params)
                yield f"{name}: {found.bytes / 1e6:.0f} MB, {found.unproved}{filled}"
        whole: dict[str, list[str]] = {}
        for name, found in self.formats.items():
            if not isinstance(found, Skipped) and (reason := found.about.get("whole_vocabulary")):
                whole.setdefault(reason, []).append(name)
        for reason, names in whole.items():
            yield f"{', '.join(names)}: its head computes all tokens, for {reason}"
        cannot: dict[tuple[str, str], list[str]] = {}
        for name, found in self.formats.items():
            about = {} if isinstance(found, Skipped) else found.about
            for problem in about.get("pipelines", {}).items():
                cannot.setdefault(problem, []).append(name)
        for (package, reason), names in cannot.items():
            yield f"{', '.join(names)} in {package}: {reason}"
        controls = [each.timing.control for each in proved.values() if not each.timing.trusted]
        if controls:
            yield f"Latency: {distrust(max(controls), self.config.timing.tolerance)}"


def verdict(formats: Mapping[str, Result]) -> str:
    """Whether the compact model is faster than the full one, in which format and by how much: at
    prefill and at decode, with the whole interval of its ratio to the full model, beside which it
    took turns, and by more than that one differed from itself."""
    kinds: dict[str, list[str]] = {"slower": [], "unknown": [], "faster": []}
    for name, found in formats.items():
        if not isinstance(found, Proof):
            continue
        steps = {"prefill": (found.ratio.prefill_ms, found.bounds.prefill)}
        if found.timing.full.decode_ms:
            steps["decode"] = found.ratio.decode_ms, found.bounds.decode
        speeds = ", ".join(f"{step} {1 / ratio:.2f}x as fast" for step, (ratio, _) in steps.items())
        control = found.timing.control
        if all(high * (1 + control) < 1 for _, (_, high) in steps.values()):
            kinds["faster"].append(f"{name} ({speeds})")
        elif any(low / (1 + control) >= 1 for _, (low, _) in steps.values()):
            kinds["slower"].append(f"{name} ({speeds})")
        elif not found.timing.trusted:
            kinds["unknown"].append(f"{name} (it differs from itself by {control:.1%})")
        else:
            spans = [
                f"{step} {1 / high:.2f}x to {1 / low:.2f}x"
                for step, (_, (low, high)) in steps.items()
            ]
            kinds["unknown"].append(f"{name} ({', '.join(spans)})")
    beginnings = {
        "slower": "NOT FASTER than the full model",
        "unknown": "Not known to be faster than the full model",
        "faster": "Faster than the full model",
    }
    told = [f"{beginnings[kind]}: {', '.join(names)}" for kind, names in kinds.items() if names]
    return ". ".join(told) or "Nothing was written that runs here"


def _filled(padding: Mapping[str, int], params: int) -> str:
    """What zeros fill up, where the format knows fewer sizes."""
    names = {"mlp_channels": "MLP channels", "query_heads": "query heads",
             "key_value_heads": "key-value heads"}  # fmt: skip
    told = [f"{padding[key]:,} {name}" for key, name in names.items() if padding.get(key)]
    if not told:
        return ""
    return (
        f"; zeros fill up {', '.join(told)} of all blocks together: "
        f"{padding['params'] / params:.1%} more parameters"
    )


def _made_up(made_up: Compensated) -> str:
    """How much of what is cut the model makes up for, and what said so."""
    told = f"Compensation: {made_up}"
    losses = [
        f"{loss:.4f} {'fitted' if what == SEQUENTIAL else f'at {float(what):.0%}'}"
        for what, loss in made_up.losses.items()
    ]
    return (
        f"{told}; divergence from the full model on held-out answers {', '.join(losses)}"
        if losses
        else told
    )


def _recovered(recovery: Mapping[str, Any]) -> str:
    """What further training at its own size was worth, and what as much is to the full model."""
    before, after = recovery["before"], recovery["after"]
    full = recovery["maximal"]
    taken = "" if recovery["taken"] else ", which was not taken"
    return (
        f"Recovery by {recovery['steps']} steps at its own size{taken}: accuracy "
        f"{before['accuracy']:.1%} before, {after['accuracy']:.1%} after; loss of held-out answers "
        f"{before['held_out_loss']:.4f}, {after['held_out_loss']:.4f}. The full model after as "
        f"many: accuracy {full['before']['accuracy']:.1%}, {full['after']['accuracy']:.1%}"
    )


def _instead_of(chosen: Model, written: Model) -> str:
    """What one size for all layers costs."""
    told = [
        f"{before / 1e6:.1f} M {name} instead of {now / 1e6:.1f} M"
        for before, now, name in (
            (chosen.cost.params, written.cost.params, "parameters"),
            (chosen.cost.macs, written.cost.macs, "operations per token"),
        )
    ]
    if chosen.accuracy.accuracy is not None:
        own = written.accuracy.accuracy
        told.append(f"accuracy {chosen.accuracy.accuracy:.1%} instead of {own:.1%}")
    if chosen.sayable:
        told.append(f"a head of {chosen.sayable.tokens_known:,} tokens instead of all")
    return f"One size for all layers; {chosen.name}, with its own, has {', '.join(told)}"


def trades(proved: Mapping[str, Proof], timing: TimingConfig) -> Iterator[str | Table]:
    """By runtime, what the compact model gives up and what it gets for it."""
    runtimes: dict[str, dict[str, Proof]] = {}
    for name, found in proved.items():
        runtime, _, mode = name.partition("-")
        runtimes.setdefault(runtime, {})[f"+ {mode}" if mode else "compact"] = found
    yield (
        f"The trade, at batch {timing.batch} and a prompt of {timing.prompt_tokens} tokens. "
        "Differences are in points on the same examples, brackets 95 % intervals; every row took "
        "turns with the full model, and its speed-up is the median of those turns."
    )
    for runtime, precisions in runtimes.items():
        yield _trade(runtime, precisions)


def _trade(runtime: str, proved: Mapping[str, Proof]) -> Table:
    """A row for every precision, below the full model as it took turns with the first."""
    first = next(iter(proved.values()))
    columns = [
        "", "accuracy [95%]", "difference from full [95%]", "size MB", "memory MB",
        "prefill ms (speed-up)", "decode ms (speed-up)", "A/A control",
    ]  # fmt: skip
    full, weighed = first.timing.full, first.weighed
    rows = [[
        "full", _accuracy(first.trade.full), "", _number(weighed.full_bytes, ".0f", 1e-6),
        _number(weighed.full_memory_mb, ".0f"), _latency(full.prefill_ms),
        _latency(full.decode_ms), "",
    ]]  # fmt: skip
    for name, each in proved.items():
        own, ratio = each.latency, each.ratio
        rows.append([
            name, _accuracy(each.trade.compact), _difference(each.trade),
            _number(each.bytes, ".0f", 1e-6), _number(each.weighed.memory_mb, ".0f"),
            _latency(own.prefill_ms, ratio.prefill_ms), _latency(own.decode_ms, ratio.decode_ms),
            f"{each.timing.control:.1%}",
        ])  # fmt: skip
    known = [place for place, cells in enumerate(zip(*rows, strict=True)) if set(cells) - {"", "-"}]
    n = first.trade.compact.accuracy_n
    return Table(
        f"{runtime}, accuracy on {n} test examples" if n else runtime,
        [columns[place] for place in known],
        [[row[place] for place in known] for row in rows],
    )


def _accuracy(score: Accuracy) -> str:
    if score.accuracy_interval is None:
        return "-"
    return f"{score.accuracy:.1%} {_interval(score.accuracy_interval)}"


def _difference(trade: Trade) -> str:
    if trade.difference is None or trade.difference_interval is None:
        return ""
    return f"{100 * trade.difference:+.1f} {_interval(trade.difference_interval)}"


def _interval(bounds: Sequence[float]) -> str:
    """In points, to two digits."""
    points = [100 * bound for bound in bounds]
    return "[" + ", ".join(f"{each:.{0 if abs(each) >= 10 else 1}f}" for each in points) + "]"


def _latency(ms: float, ratio: float | None = None) -> str:
    """And how much faster than the full model; a classifier decodes nothing."""
    if not ms:
        return "-"
    return f"{ms:.1f} ({1 / ratio:.2f}x)" if ratio else f"{ms:.1f}"


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else f"{value * scale:{form}}"


def _agreement(proved: Mapping[str, Proof], truth: str) -> Table:
    rows = []
    for name, found in proved.items():
        exact, deployed, weighed = found.exact, found.deployed, found.weighed
        off = deployed.max_abs_diff
        rows.append([
            name,
            f"{exact.max_abs_diff:.1e} of {exact.largest_logit:.3g}",
            "equal" if exact.greedy_tokens_equal else "DIFFERS",
            found.precision,
            f"{deployed.equal} of {deployed.tokens}",
            "not a number" if isnan(off) else f"{off:.1e}",
            f"{_number(weighed.load_s, '.2f')} / {_number(weighed.full_load_s, '.2f')}",
        ])  # fmt: skip
    decodes = any(found.timing.full.decode_ms for found in proved.values())
    return Table(
        f"Against {truth}, exactly and then as it runs in its own runtime",
        ["", "max logit diff", "greedy" if decodes else "class", "runs in", "equal there",
         "diff there", "load s / full"],
        rows,
    )  # fmt: skip


def _said(sample: Sample, said: Mapping[str, str]) -> Said:
    prompt = sample.prompt
    shown = prompt if len(prompt) <= LONGEST else f"...{prompt[-LONGEST:]}"
    texts: dict[str, list[str]] = {}
    for name, text in {"full model": sample.full, **said}.items():
        texts.setdefault(text, []).append(name)
    lines = [f"{', '.join(names)}: {_quoted(text)}" for text, names in texts.items()]
    return Said(f"Asked: {_quoted(shown)}", [f"wanted: {_quoted(sample.answer)}", *lines])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _merge(merge: Mapping[str, Any]) -> Iterator[str | Table]:
    rows = [
        [
            entry["name"],
            entry["kind"],
            f"{entry['weight']:g}",
            f"{entry['norm']:.3g}",
            f"{entry['lost_by_cutting']:.1%}",
        ]
        for entry in merge["adapters"]
    ]
    columns = ["adapter", "method", "weight", "norm of update", "lost by cutting"]
    yield Table(f"Merged, strategy {merge['strategy']}", columns, rows)
    for pair, cosine in merge["cosine"].items():
        yield f"cosine of {pair}: {cosine:+.3f}"
