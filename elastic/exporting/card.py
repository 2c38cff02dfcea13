"""The model card of a written folder: what made it, what it is worth, how to load it.

Everything is taken from the report of the export. What the report does not say, the card leaves
out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from elastic.files import write_text

FILE = "README.md"
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForMaskedLM": "fill-mask",
}
"""The hub's name of what a model is for."""
LICENSES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "cc0-1.0", "openrail", "bigscience-bloom-rail-1.0", "gemma", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "other", "unknown",
)  # fmt: skip
"""Names the hub takes, of models that are much used; see its documentation on licenses."""
SECTIONS = {
    "method": "Adapter method", "space": "Search space", "task": "Task",
    "base_digest": "Base weights", "seed": "Seed", "device": "Measured on",
}  # fmt: skip
LIMITS = {
    "min_accuracy": "accuracy at least", "tokens_per_second": "tokens per second at least",
    "prefill_ms": "prefill ms at most", "decode_ms": "decode ms at most",
    "max_params": "parameters at most", "max_macs": "multiply-accumulates at most",
}  # fmt: skip


def write(contents: Mapping[str, Any], directory: Path, **settings: Any) -> Path:
    """DIRECTORY/README.md; the architecture and whether code comes along are read from the folder,
    unless `settings` (as of `text`) say them."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    from elastic.formats import hf

    known: dict[str, Any] = {
        "auto": hf.auto_of(config["architectures"][0]),
        "code": (directory / hf.CODE).is_file() or "auto_map" in config,
    }
    write_text(directory / FILE, text(contents, **(known | settings)))
    return directory / FILE


def text(
    contents: Mapping[str, Any],
    *,
    auto: str = "AutoModelForCausalLM",
    code: bool = False,
    kind: str = "hf",
) -> str:
    """The card of the folder of format `kind`, metadata first.

    `contents` is report.json's: name, sub_adapter, params, macs, full_params, full_macs, formats,
    base_model, versions, and, where known, accuracy, accuracy_n, accuracy_interval, license,
    method, space, budget, task, seed. `auto` is the transformers class that loads the folder,
    `code` whether it holds a model class of its own.
    """
    blocks = [
        f"# {_plain(contents['name'])}",
        _summary(contents, code),
        *_quality(contents, contents["formats"].get(kind, {})),
        *_latency(contents["formats"].get(kind, {})),
        "## How to load it",
        _loading(auto, code),
        "## Sizes by layer",
        _sizes(contents["sub_adapter"]),
        "## How it was made",
        _origin(contents),
    ]
    return f"---\n{_metadata(contents, auto, code)}---\n\n" + "\n\n".join(blocks) + "\n"


def is_hub_name(base: str) -> bool:
    """Whether a base model's path can be the name of a repository, and is no folder here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base)) and not Path(base).exists()


def _metadata(contents: Mapping[str, Any], auto: str, code: bool) -> str:
    """The YAML that the hub reads. A base model that is a folder of somebody's machine, or a name
    of ours, is no repository: the hub would refuse it or link to a stranger's."""
    base = str(contents["base_model"])
    values: dict[str, Any] = {"library_name": "transformers"}
    if is_hub_name(base):
        values |= {"base_model": base, "base_model_relation": "finetune"}
    if license := contents.get("license"):
        values |= _license(str(license))
    if pipeline := PIPELINES.get(auto):
        values["pipeline_tag"] = pipeline
    values["tags"] = ["elastic-adapters", "lora", "pruned", *(["custom_code"] if code else [])]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _license(name: str) -> dict[str, str]:
    """The hub knows a list of names; others are "other", with a name."""
    known = name.lower()
    return {"license": known} if known in LICENSES else {"license": "other", "license_name": known}


def license_of(base: Path) -> str | None:
    """What the card in a base model's folder says, if it has one."""
    card = base / FILE
    if not card.is_file():
        return None
    head = re.match(r"---\r?\n(.*?)\r?\n---", card.read_text(encoding="utf-8"), re.DOTALL)
    try:
        values = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return None
    found = (
        values.get("license_name") or values.get("license") if isinstance(values, dict) else None
    )
    return found if isinstance(found, str) else None


def _summary(c: Mapping[str, Any], code: bool) -> str:
    layers = "layers of different sizes" if code else "the family's own model class"
    return (
        f"A compact model cut from {_code(c['base_model'])} with elastic-adapters: "
        f"{c['params'] / 1e6:.1f} M of {c['full_params'] / 1e6:.1f} M parameters and "
        f"{c['macs'] / c['full_macs']:.0%} of the operations per token, {layers}."
    )


def _quality(c: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    if c.get("accuracy") is None:
        return
    yield "## Quality"
    line = f"Accuracy {c['accuracy']:.1%}"
    if interval := c.get("accuracy_interval"):
        line += f" (95 % interval {interval[0]:.1%} to {interval[1]:.1%})"
    yield f"{line} on {c['accuracy_n']} test examples that the search never saw."
    if found.get("full_accuracy") is not None:
        low, high = found["difference_interval"]
        yield (
            f"On {found['full_accuracy_n']} of them the full model reaches "
            f"{found['full_accuracy']:.1%} and this one {found['accuracy']:.1%}, a difference of "
            f"{100 * found['difference']:+.1f} points (95 % interval {100 * low:+.1f} to "
            f"{100 * high:+.1f})."
        )


def _latency(found: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        [name, f"{found[key]:.2f}", f"{found[f'full_{key}']:.2f}",
         f"{found[key] / found[f'full_{key}']:.0%}"]
        for name, key in (("prefill, ms", "prefill_ms"), ("one more token, ms", "decode_ms"))
        if found.get(key) and found.get(f"full_{key}")
    ]  # fmt: skip
    if not rows:
        return
    yield "## Latency"
    yield _table(["", "this model", "full model", "ratio"], rows)
    if not found.get("trusted", True):
        yield "The machine was too busy for these times to be trusted."


def _loading(auto: str, code: bool) -> str:
    extra = ", trust_remote_code=True" if code else ""
    lines = [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        'folder = "."  # this folder, or its name on the hub',
        f"tokenizer = AutoTokenizer.from_pretrained(folder{extra})",
        f"model = {auto}.from_pretrained(folder{extra})",
    ]
    shown = "```python\n" + "\n".join(lines) + "\n```"
    if code:
        shown += (
            "\n\nNo configuration of the family's class can say sizes that differ from layer to "
            "layer, so `modeling_elastic.py` in this folder does, in some thirty lines. Read them "
            "before you trust them."
        )
    return shown


def _sizes(sub_adapter: Mapping[str, int]) -> str:
    """One row per run of layers with the same sizes, one column per kind of group."""
    columns: dict[str, None] = {}
    whole: dict[str, int] = {}
    blocks: dict[str, dict[str, int]] = {}
    for name, size in sub_adapter.items():
        block, _, kind = name.rpartition(".")
        if "*" in block or not re.search(r"\.\d+(\.|$)", block):
            whole[name] = size
            continue
        columns[kind] = None
        blocks.setdefault(block, {})[kind] = size
    rows: list[tuple[str, str, dict[str, int]]] = []
    for block, sizes in blocks.items():
        if rows and rows[-1][2] == sizes and _follows(rows[-1][1], block):
            rows[-1] = (rows[-1][0], block, sizes)
        else:
            rows.append((block, block, sizes))
    parts = []
    if rows:
        parts.append(_table(["layers", *columns], [
            [_span(first, last), *(_size(sizes.get(kind)) for kind in columns)]
            for first, last, sizes in rows
        ]))  # fmt: skip
    parts += [f"{_code(name)}: {size}" for name, size in whole.items()]
    return "\n\n".join(parts) or "Nothing was cut."


def _size(size: int | None) -> str:
    return "" if size is None else "left out" if size == 0 else str(size)


def _follows(one: str, other: str) -> bool:
    """Whether names differ by one in their last number alone."""
    before, after = (re.split(r"(?<=\.)(\d+)(?=\D*$)", name) for name in (one, other))
    if len(before) != 3 or len(after) != 3 or before[::2] != after[::2]:
        return False
    return int(after[1]) == int(before[1]) + 1


def _span(first: str, last: str) -> str:
    numbers = re.findall(r"\.(\d+)\D*$", last)
    return _code(first) if first == last else f"{_code(first)} to {numbers[0]}"


def _origin(c: Mapping[str, Any]) -> str:
    lines = [f"Base model: {_code(c['base_model'])}"]
    if c.get("license"):
        lines.append(f"License of the base model: {_plain(c['license'])}")
    for key, title in SECTIONS.items():
        if c.get(key) is not None:
            lines.append(f"{title}: {_code(c[key]) if key != 'device' else _plain(c[key])}")
    for name, limit in (c.get("budget") or {}).items():
        amount = limit if isinstance(limit, str) else f"{limit:g}"
        lines.append(f"Budget: {_plain(LIMITS.get(name, name))} {_plain(amount)}")
    if "merge" in c:
        names = ", ".join(_code(entry["name"]) for entry in c["merge"]["adapters"])
        lines.append(f"Merged adapters: {names} ({_code(c['merge']['strategy'])})")
    versions = ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in c.get("versions", {}).items())
    lines += [f"Versions: {versions}"] if versions else []
    return "\n".join(f"- {line}" for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    align = ["---", *(["---:"] * (len(head) - 1))]
    return "\n".join(line(row) for row in ([_plain(name) for name in head], align, *rows))


def _plain(value: Any) -> str:
    """Text that markdown shows as it is, on one line."""
    flat = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>()#|~!])", r"\\\1", flat)


def _code(value: Any) -> str:
    """A code span, on one line, that no backtick inside ends."""
    flat = " ".join(str(value).split())
    longest = max((len(run) for run in re.findall(r"`+", flat)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{fence}{pad}{flat}{pad}{fence}"
