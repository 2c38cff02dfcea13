"""The report of an export: that what was written is what was trained, and what it is worth beside
the full model. As tables, as Markdown and as one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from elastic.console import wide
from elastic.latency.measure import distrust

LONGEST = 160
"""Characters of a prompt that are shown, its last ones."""


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> Any:
        from rich.table import Table as Rich

        table = Rich(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            # A long head takes lines of its own before it takes width.
            width = max([1, *(len(row[number]) for row in self.rows)])
            head = "\n".join(wrap(column, width, break_long_words=False))
            table.add_column(head, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        rows = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return "\n".join([f"{self.title}:", "", *(f"| {' | '.join(row)} |" for row in rows)])


@dataclass(frozen=True)
class Said:
    """A prompt, and below it who says what: one line for all that say the same."""

    asked: str
    lines: Sequence[str]

    def rich(self) -> str:
        return "\n  ".join([self.asked, *self.lines])

    def markdown(self) -> str:
        return "\n".join([self.asked, "", *(f"- {line}" for line in self.lines)])


@dataclass(frozen=True)
class Report:
    """What was written, and proof that it is what was trained."""

    directory: Path
    contents: Mapping[str, Any]

    def show(self) -> None:
        console = wide(110)
        for part in self._parts():
            shown = part if isinstance(part, str) else part.rich()
            console.print(shown, markup=False, highlight=False)
        for found in self.contents["formats"].values():
            if "path" in found:
                print(found["path"])
        print(json.dumps({"report": str(self.directory / "report.json")}))

    def markdown(self) -> str:
        parts = (part if isinstance(part, str) else part.markdown() for part in self._parts())
        return "\n\n".join(parts) + "\n"

    def _parts(self) -> Iterator[str | Table | Said]:
        """Lines and tables, in order."""
        c = self.contents
        yield c["verdict"]
        yield (
            f"Sub-adapter {c['name']}: {c['params'] / 1e6:.1f} M of {c['full_params'] / 1e6:.1f} M "
            f"parameters, {c['macs'] / c['full_macs']:.0%} of the operations per token"
        )
        if c["accuracy"] is not None:
            low, high = c["accuracy_interval"]
            yield (
                f"Accuracy {c['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}) on "
                f"{c['accuracy_n']} test examples the search never saw"
            )
        if "instead_of" in c:
            yield _instead_of(c)
        if "merge" in c:
            yield from _merge(c["merge"])
        written = {name: found for name, found in c["formats"].items() if _runs(found)}
        if written:
            yield from _trades(written, c["timing"])
            yield _agreement(written)
            for number, sample in enumerate(c["samples"]):
                yield _said(sample, {name: each["texts"][number] for name, each in written.items()})
        for name, found in c["formats"].items():
            if "skipped" in found:
                yield f"{name}: not written: {found['skipped']}"
            if "unproved" in found:
                yield f"{name}: {found['bytes'] / 1e6:.0f} MB, {found['unproved']}"
        cannot: dict[tuple[str, str], list[str]] = {}
        for name, found in c["formats"].items():
            for problem in found.get("pipelines", {}).items():
                cannot.setdefault(problem, []).append(name)
        for (package, reason), names in cannot.items():
            yield f"{', '.join(names)} in {package}: {reason}"
        controls = [found["control"] for found in written.values() if not found["trusted"]]
        if controls:
            yield f"Latency: {distrust(max(controls), c['timing']['tolerance'])}"


def verdict(formats: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether the compact model is faster than the full one, in which format and by how much: more
    than the full model differs from itself, at prefill and at decode."""
    kinds: dict[str, list[str]] = {"slower": [], "unknown": [], "faster": []}
    for name, found in formats.items():
        if not _runs(found):
            continue
        steps = {"prefill": found["prefill_ratio"]}
        if found["full_decode_ms"]:
            steps["decode"] = found["decode_ratio"]
        if not found["trusted"]:
            kinds["unknown"].append(f"{name} (it differs from itself by {found['control']:.1%})")
            continue
        faster = all(ratio < 1 - found["control"] for ratio in steps.values())
        speeds = ", ".join(f"{step} {1 / ratio:.2f}x as fast" for step, ratio in steps.items())
        kinds["faster" if faster else "slower"].append(f"{name} ({speeds})")
    beginnings = {
        "slower": "NOT FASTER than the full model",
        "unknown": "Not known to be faster than the full model, which timed twice disagrees",
        "faster": "Faster than the full model",
    }
    told = [f"{beginnings[kind]}: {', '.join(names)}" for kind, names in kinds.items() if names]
    return ". ".join(told) or "Nothing was written that runs here"


def _runs(found: Mapping[str, Any]) -> bool:
    """Whether it was written, and run here."""
    return "skipped" not in found and "unproved" not in found


def _instead_of(c: Mapping[str, Any]) -> str:
    """What one size for all layers costs."""
    chosen = c["instead_of"]
    told = [
        f"{chosen[key] / 1e6:.1f} M {name} instead of {c[key] / 1e6:.1f} M"
        for key, name in (("params", "parameters"), ("macs", "operations per token"))
    ]
    if chosen["accuracy"] is not None:
        told.append(f"accuracy {chosen['accuracy']:.1%} instead of {c['accuracy']:.1%}")
    return f"One size for all layers; {chosen['name']}, with its own, has {', '.join(told)}"


def _trades(
    formats: Mapping[str, Mapping[str, Any]], timing: Mapping[str, Any]
) -> Iterator[str | Table]:
    """By runtime, what the compact model gives up and what it gets for it."""
    runtimes: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, found in formats.items():
        runtime, _, mode = name.partition("-")
        runtimes.setdefault(runtime, {})[f"+ {mode}" if mode else "compact"] = found
    yield (
        f"The trade, at batch {timing['batch']} and a prompt of {timing['prompt_tokens']} tokens. "
        "Differences are in points on the same examples, brackets 95 % intervals; every row took "
        "turns with the full model, and its speed-up is the median of those turns."
    )
    for runtime, found in runtimes.items():
        yield _trade(runtime, found)


def _trade(runtime: str, formats: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for every precision, below the full model as it took turns with the first."""
    first = next(iter(formats.values()))
    full = {key[len("full_") :]: value for key, value in first.items() if key.startswith("full_")}
    models = {"full": full, **formats}
    columns = {
        "accuracy [95%]": [_accuracy(each) for each in models.values()],
        "difference from full [95%]": [_difference(each) for each in models.values()],
        "size MB": [_number(each, "bytes", ".0f", 1e-6) for each in models.values()],
        "memory MB": [_number(each, "memory_mb", ".0f") for each in models.values()],
        "prefill ms (speed-up)": [_latency(each, "prefill") for each in models.values()],
        "decode ms (speed-up)": [_latency(each, "decode") for each in models.values()],
        "A/A control": ["", *(f"{each['control']:.1%}" for each in formats.values())],
    }
    known = {name: cells for name, cells in columns.items() if set(cells) - {"", "-"}}
    n = first["accuracy_n"]
    return Table(
        f"{runtime}, accuracy on {n} test examples" if n else runtime,
        ["", *known],
        list(zip(models, *known.values(), strict=True)),
    )


def _accuracy(found: Mapping[str, Any]) -> str:
    if found.get("accuracy") is None:
        return "-"
    return f"{found['accuracy']:.1%} {_interval(found['accuracy_interval'])}"


def _difference(found: Mapping[str, Any]) -> str:
    if found.get("difference") is None:
        return ""
    return f"{100 * found['difference']:+.1f} {_interval(found['difference_interval'])}"


def _interval(bounds: Sequence[float]) -> str:
    """In points, to two digits."""
    points = [100 * bound for bound in bounds]
    return "[" + ", ".join(f"{each:.{0 if abs(each) >= 10 else 1}f}" for each in points) + "]"


def _latency(found: Mapping[str, Any], step: str) -> str:
    """Milliseconds, and how much faster than the full model; a classifier decodes nothing."""
    if not found[f"{step}_ms"]:
        return "-"
    speed = f" ({1 / found[f'{step}_ratio']:.2f}x)" if f"{step}_ratio" in found else ""
    return f"{found[f'{step}_ms']:.1f}{speed}"


def _number(found: Mapping[str, Any], key: str, form: str, scale: float = 1) -> str:
    value = found.get(key)
    return "-" if value is None else f"{value * scale:{form}}"


def _agreement(formats: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for name, found in formats.items():
        deployed = found["deployed"]
        off = deployed["max_abs_diff"]
        rows.append([
            name,
            f"{found['max_abs_diff']:.1e} of {found['largest_logit']:.3g}",
            "equal" if found["greedy_tokens_equal"] else "DIFFERS",
            deployed["precision"],
            f"{deployed['tokens_equal']} of {deployed['tokens']}",
            "not a number" if off is None else f"{off:.1e}",
            f"{_number(found, 'load_s', '.2f')} / {_number(found, 'full_load_s', '.2f')}",
        ])  # fmt: skip
    answer = "greedy" if _decodes(formats) else "class"
    return Table(
        "Against the supernet, exactly and then as it runs in its own runtime",
        ["", "max logit diff", answer, "runs in", "equal there", "diff there", "load s / full"],
        rows,
    )


def _said(sample: Mapping[str, str], said: Mapping[str, str]) -> Said:
    prompt = sample["prompt"]
    shown = prompt if len(prompt) <= LONGEST else f"...{prompt[-LONGEST:]}"
    texts: dict[str, list[str]] = {}
    for name, text in {"full model": sample["full"], **said}.items():
        texts.setdefault(text, []).append(name)
    lines = [f"{', '.join(names)}: {_quoted(text)}" for text, names in texts.items()]
    return Said(f"Asked: {_quoted(shown)}", [f"wanted: {_quoted(sample['answer'])}", *lines])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _decodes(formats: Mapping[str, Mapping[str, Any]]) -> bool:
    return any(found["full_decode_ms"] for found in formats.values())


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
