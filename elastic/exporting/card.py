"""The model card of a written folder: what made it, what it is worth, how to load it.

Everything is taken from the report of the export. What the report does not say, the card leaves
out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from elastic.config.search import AT_LEAST
from elastic.console import say
from elastic.errors import RunError
from elastic.exporting.pieces import code_span, fence_of, literal, markdown_table
from elastic.exporting.proof import Accuracy, Proof
from elastic.exporting.report import Report, trades
from elastic.files import write_text
from elastic.formats import hf
from elastic.formats.auto_class import auto_of
from elastic.latency.measure import Latency, Measurement
from elastic.models import loading
from elastic.models.kinds import Kind
from elastic.plain import parse_yaml, read_text
from elastic.run import as_plain

FILE = "README.md"
ALONE = {"hf": ""}
"""The place of a Hugging Face folder that nothing else goes with."""
LIBRARIES = {"hf": "transformers", "peft": "peft"}
"""What the hub calls the library that loads a repository, by the first of these formats in it."""
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForImageTextToText": "image-text-to-text",
}
"""The hub's name of what a model is for."""
CLASSES = {
    Kind.CLASSIFIER: "AutoModelForSequenceClassification",
    Kind.ENCODER_DECODER: "AutoModelForSeq2SeqLM",
}
"""The transformers class of a base model, where it is not that of a decoder."""
RUNTIMES = {
    "peft": '`PeftModel.from_pretrained(base_model, "{}")`',
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "gguf": "llama.cpp",
    "nemotron_nas": "mlx-lm, vLLM, SGLang, TensorRT-LLM",
    "elastic": '`elastic.load("{}")`, in every size',
}
"""What runs a format that transformers does not, from this folder."""
LICENSES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "cc0-1.0", "openrail", "bigscience-bloom-rail-1.0", "gemma", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "other", "unknown",
)  # fmt: skip
"""Names the hub takes, of models that are much used; see its documentation on licenses."""
SPELT_OUT = {"params": "parameters", "macs": "multiply-accumulates", "mb": "MB"}


def write(report: Report, directory: Path, places: Mapping[str, str] = ALONE) -> Path:
    """DIRECTORY/README.md, of a Hugging Face folder or, where there is none among `places`, of the
    folder with all formats. The architecture and whether code comes along are read from there."""
    known: dict[str, Any]
    if "hf" in places:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        code = (directory / hf.CODE).is_file()
        copied = "auto_map" in config and not code
        known = {"auto": auto_of(config["architectures"][0]), "code": code, "copied": copied}
    else:
        kind = loading.kind_of_base(report.trained.model)
        known = {"auto": CLASSES.get(kind, "AutoModelForCausalLM")}
        if places.get("elastic") == "":  # whose own card this one takes the place of
            known["every_size"] = read_text(directory / "elastic" / FILE)
    write_text(directory / FILE, text(report, places=places, **known))
    return directory / FILE


def text(
    report: Report,
    *,
    auto: str = "AutoModelForCausalLM",
    code: bool = False,
    copied: bool = False,
    places: Mapping[str, str] = ALONE,
    every_size: str = "",
) -> str:
    """The card of a report's Hugging Face folder, or of a repository, metadata first.

    `auto` is the transformers class that loads the folder, `code` whether it holds a model class of
    ours, `copied` whether one of the base's folder, which the user trusted. `places` are the
    formats that stand there, as `push.places` has them, `every_size` the card of a folder of every
    size.
    """
    proof = report.proved.get("hf")
    others = {kind: place for kind, place in places.items() if kind != "hf"}
    blocks = [
        f"# {literal(report.model.name)}",
        _summary(report, "hf" in places, code),
        *_known_tokens(report),
        *([_PICTURES] if "Image" in auto else ()),
        *_quality(report.model.accuracy, proof),
        *(_latency(proof.latency, proof.timing) if proof else ()),
        "## How to load it",
        *([_loading(auto, code, copied, report.config.push_to_hub)] if "hf" in places else ()),
        *_others(report, others),
        *(["## Every size", every_size.strip()] if every_size else ()),
        "## Sizes by layer",
        _sizes(report.model.sub.as_dict()),
        "## How it was made",
        _origin(report),
        "## How to make it again",
        *_recipe(report),
    ]
    metadata = _metadata(report, auto, code or copied, places)
    return f"---\n{metadata}\n---\n\n" + "\n\n".join(blocks) + "\n"


_PICTURES = "It was trained, cut and scored on text; what it makes of pictures nobody has judged."


def _known_tokens(report: Report) -> Iterator[str]:
    """What a head of some tokens cannot say."""
    if report.model.sayable:
        yield (
            "This model answers one task. Its head computes the logits of some tokens, those of "
            "the others are minus infinity, so that it never says them: it knows "
            f"{report.model.sayable}."
        )


def is_hub_name(path: str) -> bool:
    """Whether this can be the name of a repository, and is no folder here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path)) and not Path(path).exists()


def _metadata(report: Report, auto: str, code: bool, places: Mapping[str, str]) -> str:
    """The YAML that the hub reads. A base model that is a folder of somebody's machine, or a name
    of ours, is no repository: the hub would refuse it or link to a stranger's. Data of one's own
    get a name that no repository has.
    """
    base, task = str(report.origin["base_model"]), report.trained.task
    data = str(report.origin["task"])
    pipeline, score = PIPELINES.get(auto), report.model.accuracy.accuracy
    library = next((name for kind, name in LIBRARIES.items() if kind in places), "elastic-adapters")
    known: dict[str, Any] = {}
    if is_hub_name(base):
        relation = "adapter" if library == "peft" else "finetune"
        known |= {"base_model": base, "base_model_relation": relation}
    if name := (report.license or "").lower():  # of others than it lists, the hub takes a name
        listed = {"license": name}
        known |= listed if name in LICENSES else {"license": "other", "license_name": name}
    if is_hub_name(data):
        known |= {"datasets": [data]}
    if score is not None:
        public = is_hub_name(data)
        result = EvalResult(
            task_type=pipeline if pipeline and "image" not in pipeline else "text-generation",
            dataset_type=data if public else f"elastic-adapters-{task.name}",
            dataset_name=data if public else Path(task.test or data).name,
            dataset_config=task.subset,
            dataset_split="test",
            metric_type="accuracy",
            metric_value=score,
        )
        known |= {"model_name": report.model.name, "eval_results": [result]}
    runtimes = dict.fromkeys(kind.partition("-")[0] for kind in places)
    more = [name for name in runtimes if name in ("onnx", "openvino", "gguf")]
    return ModelCardData(
        library_name=library,
        pipeline_tag=pipeline,
        tags=["elastic-adapters", "lora", "pruned", *more, *(["custom_code"] if code else [])],
        **known,
    ).to_yaml()


def license_of(base: Path) -> str | None:
    """What the card in a base model's folder says, if it has one that can be read and names a
    license on one line. Nothing that stands there ends an export."""
    file = base / FILE
    if not file.exists():
        return None
    try:
        block = re.match(r"\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", read_text(file), re.S | re.M)
        values = parse_yaml(block[1], file, RunError) if block else {}
    except RunError as error:
        say(f"The license of the base model is not known: {error}")
        return None
    found = values.get("license_name") or values.get("license") if isinstance(values, dict) else ""
    is_license = isinstance(found, str) and re.fullmatch(r"[\w.+ -]{1,100}", found)
    return found if is_license else None


def _summary(report: Report, is_folder: bool, code: bool) -> str:
    layers = ", layers of different sizes" if code else ", the family's own model class"
    own, full = report.model.cost, report.model.full_cost
    base = code_span(_unplaced(report.origin["base_model"]))
    active = ""
    if full.active_params < full.params:
        active = (
            f" ({own.active_params / 1e6:.1f} M of {full.active_params / 1e6:.1f} M for a token, "
            "which is sent to some of its experts)"
        )
    return (
        f"A compact model cut from {base} with elastic-adapters: "
        f"{own.params / 1e6:.1f} M of {full.params / 1e6:.1f} M parameters{active} and "
        f"{own.macs / full.macs:.0%} of the operations per token{layers if is_folder else ''}."
    )


def _quality(score: Accuracy, proof: Proof | None) -> Iterator[str]:
    if not score.told:
        return
    yield "## Quality"
    yield f"{score.told} that the search never saw."
    if proof and proof.trade.difference is not None and proof.trade.difference_interval:
        own, full = proof.trade.compact, proof.trade.full
        low, high = proof.trade.difference_interval
        yield (
            f"On {full.accuracy_n} of them the full model reaches {full.accuracy:.1%} and this one "
            f"{own.accuracy:.1%}, a difference of {100 * proof.trade.difference:+.1f} points "
            f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f})."
        )


def _latency(own: Latency, timing: Measurement) -> Iterator[str]:
    rows = [
        [name, f"{mine:.2f}", f"{full:.2f}", f"{mine / full:.0%}"]
        for name, mine, full in (
            ("prefill, ms", own.prefill_ms, timing.full.prefill_ms),
            ("one more token, ms", own.decode_ms, timing.full.decode_ms),
        )
        if mine and full
    ]
    if not rows:
        return
    yield "## Latency"
    yield markdown_table(["", "this model", "full model", "ratio"], rows)
    if not timing.trusted:
        yield "The machine was too busy for these times to be trusted."


def _others(report: Report, places: Mapping[str, str]) -> Iterator[str]:
    """Where each format is that transformers does not load, and what it is worth."""
    if not places:
        return
    lines = []
    for kind, place in places.items():
        runtime, _, mode = kind.partition("-")
        bits = f", weights in {mode}" if mode else ""
        folder = f"folder/{place}".rstrip("/")
        lines.append(f"- {code_span(folder)}: {RUNTIMES[runtime].format(folder)}{bits}")
    fetched = f"hf download {report.config.push_to_hub} --local-dir folder"
    yield f"For other programs, after {code_span(fetched)}:"
    yield "\n".join(lines)
    proved = {kind: found for kind, found in report.proved.items() if kind in places}
    if proved:
        yield "## In other programs"
        for part in trades(proved, report.config.timing):
            yield part if isinstance(part, str) else part.markdown()


def _loading(auto: str, code: bool, copied: bool, repository: str | None) -> str:
    extra = ", trust_remote_code=True" if code or copied else ""
    place = f'"{repository}"' if repository else '"."  # this folder, or its name on the hub'
    lines = [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f"folder = {place}",
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
    if copied:
        shown += (
            "\n\nThe Python code in this folder is the base model's. Read it before you trust it."
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
    rows = []
    for (_, sizes), run in groupby(enumerate(blocks), lambda one: (_stack(*one), blocks[one[1]])):
        names = [name for _, name in run]
        rows.append([_span(names[0], names[-1]), *(_size(sizes.get(kind)) for kind in columns)])
    parts = [markdown_table(["layers", *map(literal, columns)], rows)] if rows else []
    parts += [f"{code_span(name)}: {size}" for name, size in whole.items()]
    return "\n\n".join(parts) or "Nothing was cut."


def _size(size: int | None) -> str:
    return "" if size is None else "left out" if size == 0 else str(size)


def _stack(place: int, block: str) -> tuple[Any, ...]:
    """The same for names that follow each other and differ by one in their last number alone."""
    before, *numbered = re.split(r"(?<=\.)(\d+)(?=\D*$)", block)
    return (before, int(numbered[0]) - place, numbered[1]) if numbered else (before,)


def _span(first: str, last: str) -> str:
    numbers = re.findall(r"\.(\d+)\D*$", last)
    return code_span(first) if first == last else f"{code_span(first)} to {numbers[0]}"


def _origin(report: Report) -> str:
    origin, about = report.origin, report.provenance
    known = {
        "Base model": code_span(_unplaced(origin["base_model"])),
        "License of the base model": report.license and literal(report.license),
        "Adapter method": code_span(origin["method"]),
        "Search space": code_span(_unplaced(origin["space"])),
        "Task": code_span(_unplaced(origin["task"])),
        "Base weights": code_span(report.base_digest),
        "Seed": code_span(report.config.seed),
        "Measured on": literal(about["device"]),
    }
    lines = [f"{title}: {value}" for title, value in known.items() if value]
    for name, limit in (origin["budget"] or {}).items():
        amount = limit if isinstance(limit, str) else f"{limit:g}"
        lines.append(f"Budget: {_limit(name)} {literal(amount)}")
    if report.merge:
        names = ", ".join(code_span(entry["name"]) for entry in report.merge["adapters"])
        lines.append(f"Merged adapters: {names} ({code_span(report.merge['strategy'])})")
    versions = (
        f"{literal(name)} {literal(version)}" for name, version in about["versions"].items()
    )
    lines.append(f"Versions: {', '.join(versions)}")
    return "\n".join(f"- {line}" for line in lines)


def _recipe(report: Report) -> Iterator[str]:
    """The commands, and the files that they read. Who makes it again pushes it nowhere."""
    changed = {"sub_adapter": "sub_adapter.json", "push_to_hub": None, "push_private": None}
    export = as_plain(report.config) | changed
    files = {
        "train.yaml": yaml.safe_dump(_unplaced(as_plain(report.trained)), sort_keys=False),
        "sub_adapter.json": json.dumps(report.model.sub.as_dict()) + "\n",
        "export.yaml": yaml.safe_dump(_unplaced(export), sort_keys=False),
    }
    yield "```sh\nelastic train --config train.yaml\nelastic export --config export.yaml\n```"
    for name, content in files.items():
        fence = fence_of(content, 3)
        shown = f"{fence}{name.rpartition('.')[2]}\n{content}{fence}"
        yield f"<details><summary>{name}</summary>\n\n{shown}\n\n</details>"


def _unplaced(value: Any) -> Any:
    """Settings with files by their names alone: their folder is nobody else's business."""
    if isinstance(value, dict):
        return {name: _unplaced(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_unplaced(each) for each in value]
    is_place = isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~/"))
    return Path(value).name if is_place else value


def _limit(name: str) -> str:
    """A field of BudgetConfig in words: "prefill ms at most" of prefill_ms."""
    words = [word for word in name.split("_") if word not in ("min", "max")]
    spelt = " ".join(SPELT_OUT.get(word, word) for word in words)
    return f"{literal(spelt)} at {'least' if name in AT_LEAST else 'most'}"
