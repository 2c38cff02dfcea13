"""One folder for every size: what a run has learnt, sliced where it is loaded.

    base/               the base model with its important channels first, a Hugging Face folder
    super_adapter/      the factors of all sizes, those of a plain LoRA whatever the method was
    NAME.safetensors    what a slice has of its own: layers that make up for what is cut
    slices.json, .csv   by slice its sizes, accuracy, costs and latencies
    sizes.json, *.py    the same sizes, layer by layer, and classes that load them with transformers
                        alone (`elastic.formats.any_size`); configuration and tokenizer for both

A slice is the leading rows and columns of the base, merged with the leading ones of the factors:
its bits are those that `elastic.supernet.compact` makes in memory. The base is mapped, not read, so
of its files only what stays in the slice comes into memory.
"""

from __future__ import annotations

import csv
import functools
import inspect
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from elastic.adapters.layers import ElasticLinear
from elastic.config import ModelConfig
from elastic.errors import RunError, unknown
from elastic.files import read_json, write_json, write_text
from elastic.formats import any_size, choosing, hf
from elastic.formats.any_size import BASE, INDEX, SIZES, VERSION, AnySize
from elastic.models import loading
from elastic.models.digest import digest_of
from elastic.models.modules import module_tree, modules_of, put_
from elastic.plain import is_name, one_line, shaped
from elastic.spaces.bound import SubAdapter
from elastic.supernet.as_lora import as_lora
from elastic.supernet.compact import compact
from elastic.supernet.depth import settle_
from elastic.supernet.store import (
    load_super_adapter,
    read_about,
    read_factors,
    save_super_adapter,
)
from elastic.supernet.streaming import streamed, take_settings_
from elastic.supernet.supernet import Supernet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TABLE, ADAPTER = "slices.csv", "super_adapter"
_SHAPE = {
    "version": int, "dtype": str, "head": str, "classes": [str], "slices": dict, "latencies": [dict]
}  # fmt: skip
_SLICE = {"sub_adapter": dict, "own": bool, "params": int, "macs": int}
FIGURES = ("params", "macs", "memory_mb", "accuracy", "accuracy_n")
"""What the table has of every slice, where it is known, beside latencies."""


@dataclass(frozen=True)
class Slice:
    """One size, as it is written."""

    name: str
    sub_adapter: SubAdapter
    model: PreTrainedModel
    """Sliced and merged, with what it makes up for."""
    figures: Mapping[str, Any]
    """For JSON: accuracy with its number of examples and interval, costs, compensation."""


@torch.no_grad()
def write(
    net: Supernet,
    tokenizer: PreTrainedTokenizerBase,
    slices: Iterable[Slice],
    directory: Path,
    *,
    model: ModelConfig,
    dtype: torch.dtype,
    latencies: Iterable[Mapping[str, Any]] = (),
    max_shard_size: int | str = hf.SHARD,
) -> None:
    """Write all of it into a new folder, weights in `dtype`; one slice is in memory at a time.

    `latencies` are tables, one for a device and runtime: what was timed, and by slice its
    milliseconds.
    """
    base = _ordered_base(net)
    hf.write(base, tokenizer, directory / BASE, dtype=dtype, max_shard_size=max_shard_size)
    digest, plain = digest_of(directory / BASE), as_lora(net)
    # Its base is the one beside it. Folders of this machine are nobody else's business.
    model = replace(model, path=BASE)
    save_super_adapter(net, directory / ADAPTER, model=model, base_digest=digest, plain=plain)
    about, sizes = {}, {}
    for one in slices:
        own = _own(net, one, dtype)
        if own:
            save_file(own, directory / f"{one.name}.safetensors")
        sub = plain.sub_adapter(net, one.sub_adapter)
        about[one.name] = {"sub_adapter": sub.as_dict(), "own": bool(own), **one.figures}
        sizes[one.name] = _sizes(net, one, plain.rank_of)
    hf.write_tokenizer(tokenizer, directory)
    auto = _write_classes(base, directory, dtype, sizes)
    index = {
        "version": VERSION,
        "dtype": str(dtype).removeprefix("torch."),
        "head": model.head,
        "classes": model.classes,
        "slices": about,
        "latencies": [dict(each) for each in latencies],
    }
    write_json(directory / INDEX, index)
    write_text(directory / TABLE, _csv(index))
    write_text(directory / "README.md", _card(index, auto))


def _ordered_base(net: Supernet) -> PreTrainedModel:
    """The base in the supernet's order, which computes what it did."""
    with net.active(net.space.maximal()):
        model = module_tree(net.model)
        for site, layer in modules_of(net.model, ElasticLinear):
            model.set_submodule(site, layer.base)
        return settle_(model).eval()


def _own(net: Supernet, one: Slice, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the leading rows and columns do not give, bit for bit."""
    plain = compact(net, one.sub_adapter).state_dict()
    return {
        name: tensor.to("cpu", dtype).contiguous()
        for name, tensor in one.model.state_dict().items()
        if not torch.equal(tensor.to(dtype), plain[name].to(dtype))
    }


SAID_ONCE = ("architectures", "auto_map", "dtype", "model_type", "transformers_version")
"""Of a configuration, what is the same of all sizes."""


def _words(model: PreTrainedModel) -> dict[str, Any]:
    """What a configuration says of the sizes of a model."""
    said = hf.described_config(model, code=False).to_dict()
    return {key: value for key, value in said.items() if key not in SAID_ONCE}


def _sizes(net: Supernet, one: Slice, rank_of: Callable[[int], int]) -> dict[str, Any]:
    """Of a slice, as `elastic.formats.any_size` reads it: what its configuration says, which blocks
    it runs, and by layer rows and columns (a number of the first ones, or of several parts the
    start and length of each) and rank."""
    with net.active(one.sub_adapter):
        gone = net.space.left_out(one.sub_adapter)
        layers = {
            site: [
                layer.size.row_parts or layer.size.rows,
                layer.size.column_parts or layer.size.columns,
                rank_of(layer.size.rank) if layer.adapter is not None else 0,
            ]
            for site, layer in modules_of(net.model, ElasticLinear)
            if not site.startswith(gone)
        }
    return {
        "config": _words(one.model),
        "blocks": net.space.kept(one.sub_adapter),
        "layers": layers,
    }


_IMPORTS = f"""from .any_size import {AnySize.__name__}
from .choosing import FULL  # noqa: F401 (transformers 4 copies what is named in this file alone)"""


def _write_classes(
    base: PreTrainedModel, directory: Path, dtype: torch.dtype, sizes: Mapping[str, Any]
) -> str | None:
    """What transformers alone needs to load one size. Gives the name of the auto class that does;
    None, and nothing is written, for a base of which none knows the class, or whose code is its own
    folder's."""
    if base.is_remote_code() or not hf.is_plain(base) or not hf.has_auto(base):
        return None
    config = hf.own_config(hf.described_config(base, code=False), type(base).__name__)
    hf.write_settings(base, config, directory, dtype, own=True)
    whole = _words(base)
    for one in sizes.values():
        one["config"] = {k: v for k, v in one["config"].items() if v != whole.get(k)}
    write_text(directory / SIZES, json.dumps({"version": VERSION, "slices": sizes}) + "\n")
    write_text(directory / hf.CODE, hf.code_of(base, AnySize.__name__, _IMPORTS))
    for module in (any_size, choosing):
        name = module.__name__.rpartition(".")[2]
        write_text(directory / f"{name}.py", inspect.getsource(module))
    return hf.auto_of(type(base).__name__)


def read(directory: Path | str) -> dict[str, Any]:
    """The index of such a folder; RunError for another one, or a newer version's."""
    file = Path(directory) / INDEX
    index = shaped(read_json(file), _SHAPE, file)
    if index["version"] > VERSION:
        raise RunError(
            f"{file}: version {index['version']}, and this one reads up to {VERSION}; install a "
            "newer elastic-adapters, or export again"
        )
    for name, about in index["slices"].items():
        if not is_name(name):
            raise RunError(f"{file}: slices: {name!r} is no name")
        shaped(about, _SLICE, f"{file}: {name}")
        shaped(about["sub_adapter"], dict.fromkeys(about["sub_adapter"], int), f"{file}: {name}")
    return dict(index)


@torch.no_grad()
def load(
    directory: Path | str, name: str, *, device: str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The slice of this name, in the type that it is stored in; RunError where there is none, or
    where files are damaged. Nothing in the folder is run as code unless that is allowed."""
    directory = Path(directory)
    index = read(directory)
    about = about_of(directory, index, name)
    config = base_of(directory, index, trust_remote_code=trust_remote_code)
    dtype = loading.resolve_dtype(config.dtype, torch.device("cpu"))
    known = read_about(directory / ADAPTER)["base_digest"]
    net = load_super_adapter(loading.skeleton(config, dtype), known, directory / ADAPTER)
    base = loading.load_model(config.path, config)
    take_settings_(net.model, base)
    factors = read_factors(directory / ADAPTER) if net.head else {}
    sub = net.space.check(SubAdapter(tuple(about["sub_adapter"].items())))
    head = {key: factors[key] for key in net.head}
    found = streamed(base, net, sub, head, is_ordered=True)
    model, made = found.model, dict(found.tensors)
    if about["own"]:
        made |= own_tensors(directory, name, made)
    tied = model.all_tied_weights_keys
    for key, empty in model.state_dict(keep_vars=True).items():
        if key not in tied or tied[key] not in made:
            tensor: Tensor = made[key]().to(device, dtype).contiguous()
            put_(model, key, nn.Parameter(tensor) if isinstance(empty, nn.Parameter) else tensor)
    model.tie_weights()
    model.config = hf.described_config(model, code=False)
    return model.to(device).eval()


def about_of(directory: Path, index: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the index says of a slice; RunError where there is none of this name."""
    if name not in index["slices"]:
        raise RunError(f"{directory}: {unknown('slice', name, index['slices'])}")
    return dict(index["slices"][name])


def base_of(
    directory: Path, index: Mapping[str, Any], *, trust_remote_code: bool, device: str = "cpu"
) -> ModelConfig:
    """How the base in the folder is loaded."""
    return ModelConfig(
        path=str(directory / BASE), dtype=index["dtype"], device=device, head=index["head"],
        classes=index["classes"], trust_remote_code=trust_remote_code,
    )  # fmt: skip


def own_tensors(
    directory: Path, name: str, expected: Mapping[str, Any]
) -> dict[str, Callable[[], Tensor]]:
    """What makes the tensors that a slice has of its own, by their names in its model; RunError for
    a damaged file."""
    file = directory / f"{name}.safetensors"
    try:
        tensors = safe_open(file, "pt")
        names = list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise RunError(f"{file}: damaged, or not there: {one_line(error)}") from None
    if strange := sorted(set(names) - set(expected)):
        raise RunError(f"{file}: {strange[0]} is no tensor of this slice; the file is of another")
    return {name: functools.partial(tensors.get_tensor, name) for name in names}


def _card(index: Mapping[str, Any], auto: str | None) -> str:
    """What the folder is, to a stranger."""
    rows = []
    for name, about in index["slices"].items():
        accuracy = about.get("accuracy")
        low, high = about.get("accuracy_interval") or (0, 0)
        told = "" if accuracy is None else f"{accuracy:.1%} ({low:.1%} to {high:.1%})"
        times = [
            f"{table['slices'][name]['prefill_ms']:.1f} ms" if name in table["slices"] else ""
            for table in index["latencies"]
        ]
        best = " (best)" if about.get("best") else ""
        rows.append([name + best, f"{about['params'] / 1e6:.1f} M", told, *times])
    head = ["slice", "parameters", "test accuracy (95 % interval)"]
    head += [f"prefill, {table['device']}" for table in index["latencies"]]
    lines = [head, ["---"] * len(head), *rows]
    with_transformers = _WITH_TRANSFORMERS.format(auto=auto) if auto else ""
    return (
        _CARD
        + with_transformers
        + _FIGURES
        + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    )


_CARD = """One model in several sizes, written by elastic-adapters. The size is chosen where it is
loaded, by its name or by what may be spent on this machine:

```python
import elastic

model = elastic.load("this/folder", budget={"prefill_ms": 25})
model = elastic.load("this/folder", budget="80%")  # of the full model's prefill
model = elastic.load("this/folder", slice="full")
```

Each is a plain transformers model; the tokenizer is beside it.
"""
_WITH_TRANSFORMERS = """
Without that package, by the classes in this folder, which are to be read before they are trusted:

```python
from transformers import {auto}

{auto}.from_pretrained(
    "this/folder", trust_remote_code=True, budget={{"prefill_ms": 25}}
)
```
"""
_FIGURES = """
Numbers of parameters, accuracy on examples that chose nothing, and time to the first token:

"""


def _csv(index: Mapping[str, Any]) -> str:
    """A row for every slice, a column for every latency."""
    columns = [
        (f"{key} ({table['device']}, {table['runtime']})", table, key)
        for table in index["latencies"]
        for key in ("prefill_ms", "decode_ms")
    ]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["slice", *FIGURES, "low", "high", *(title for title, *_ in columns)])
    for name, about in index["slices"].items():
        low, high = about.get("accuracy_interval") or ("", "")
        timed = [table["slices"].get(name, {}).get(key, "") for _, table, key in columns]
        rows.writerow([name, *(about.get(key, "") for key in FIGURES), low, high, *timed])
    return text.getvalue()
