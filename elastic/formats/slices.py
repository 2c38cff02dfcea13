"""One folder for every size: what a run has learnt, sliced where it is loaded.

    base/               the base model with its important channels first, a Hugging Face folder;
                        none where the folder refers to the base as it is, elsewhere
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
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from elastic.adapters.layers import ElasticLinear
from elastic.config import ModelConfig
from elastic.config.model import Dtype, Head
from elastic.errors import ConfigError, ModelError, RunError, unknown
from elastic.files import read_json, write_json, write_text
from elastic.formats import hf, matformer, slice_classes
from elastic.formats.any_size import BASE, COPY, INDEX, VERSION
from elastic.formats.choosing import LATENCIES
from elastic.formats.saving import says_its_sizes_
from elastic.formats.shards import Tensors, tensors_of
from elastic.models import loading
from elastic.models.digest import digest_of
from elastic.models.modules import configure_, module_tree, modules_of, put_
from elastic.plain import is_name, one_line, shaped
from elastic.spaces.bound import SubAdapter
from elastic.supernet.as_lora import as_lora
from elastic.supernet.compact import compact
from elastic.supernet.depth import settle_
from elastic.supernet.store import (
    load_super_adapter,
    read_about,
    read_factors,
    read_super_adapter,
    save_super_adapter,
)
from elastic.supernet.streaming import Streamed, streamed, take_settings_
from elastic.supernet.supernet import Supernet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TABLE, ADAPTER, REFERENCE = "slices.csv", "super_adapter", "reference"
_SHAPE = {
    "version": int, "dtype": str, "head": str, "classes": [str], "slices": dict, "latencies": [dict]
}  # fmt: skip
_ONE_OF = {"base": (COPY, REFERENCE), "dtype": get_args(Dtype)[1:], "head": get_args(Head)}
"""Of types, all but auto."""
_SLICE = {"sub_adapter": dict, "own": bool, "params": int, "macs": int}
_CHOSEN_BY = ("memory_mb", "validation_estimate")
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
    tensors: Tensors | None = None
    """Of a model without data, what makes those that may be its own."""


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
    referred: str | None = None,
    stream: Callable[..., Streamed] | None = None,
) -> None:
    """Write all of it into a new folder, weights in `dtype`; one slice is in memory at a time, or
    what it has of its own if the supernet has no data and `stream` (`streamed` of its base) makes
    the tensors.

    `latencies` are tables, one for a device and runtime: what was timed, and by slice its
    milliseconds. A base that is `referred` to by its digest stays where it is.
    """
    directory.mkdir(parents=True, exist_ok=True)
    base, plain, digest = _ordered_base(net), as_lora(net), referred
    model = replace(model, path=_wherever(model.path))
    if digest is None:
        whole = stream(net.space.maximal(), merged=False).tensors if stream else None
        hf.write(
            base, tokenizer, directory / BASE, dtype=dtype, max_shard_size=max_shard_size,
            tensors=whole,
        )  # fmt: skip
        digest = digest_of(directory / BASE)
        # Its base is the one beside it. Folders of this machine are nobody else's business.
        model = replace(model, path=BASE)
    save_super_adapter(net, directory / ADAPTER, model=model, base_digest=digest, plain=plain)
    about, sizes = {}, {}
    for one in slices:
        sub = one.sub_adapter
        leading = stream(sub).tensors if stream else tensors_of(compact(net, sub))
        own = _own(one, leading, dtype)
        if own:
            save_file(own, directory / f"{one.name}.safetensors")
        chosen = plain.sub_adapter(net, sub).as_dict()
        about[one.name] = {"sub_adapter": chosen, "own": bool(own), **one.figures}
        sizes[one.name] = slice_classes.sizes_of(net, sub, one.model, plain.rank_of)
    hf.write_tokenizer(tokenizer, directory)
    auto = slice_classes.write(base, directory, dtype, sizes)
    index = {
        "version": VERSION,
        "base": COPY if referred is None else REFERENCE,
        "dtype": str(dtype).removeprefix("torch."),
        "head": model.head,
        "classes": model.classes,
        "slices": about,
        "latencies": [dict(each) for each in latencies],
    }
    write_json(directory / INDEX, index)
    write_text(directory / TABLE, _csv(index, net))
    card = _card(index, auto, None if referred is None else model.path)
    write_text(directory / "README.md", card)


def _wherever(path: str) -> str:
    """The same from any working directory."""
    place = Path(path).expanduser()
    return str(place.resolve()) if place.exists() else path


def _ordered_base(net: Supernet) -> PreTrainedModel:
    """The base in the supernet's order, which computes what it did."""
    with net.active(net.space.maximal()):
        model = module_tree(net.model)
        for site, layer in modules_of(net.model, ElasticLinear):
            model.set_submodule(site, layer.base)
        return settle_(model).eval()


def _own(one: Slice, leading: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the leading rows and columns do not give, bit for bit."""
    found = {}
    made = tensors_of(one.model) if one.tensors is None else one.tensors
    for name, make in made.items():
        tensor = make().to("cpu", dtype)
        if not torch.equal(tensor, leading[name]().to("cpu", dtype)):
            found[name] = tensor.contiguous()
    return found


def read(directory: Path | str) -> dict[str, Any]:
    """The index of such a folder; RunError for another one, or a newer version's."""
    file = Path(directory) / INDEX
    index = shaped(read_json(file), _SHAPE, file)
    if index["version"] > VERSION:
        raise RunError(
            f"{file}: version {index['version']}, and this one reads up to {VERSION}; install a "
            "newer elastic-adapters, or export again"
        )
    index.setdefault("base", COPY)  # as every folder had it once
    for key, known in _ONE_OF.items():
        if index[key] not in known:
            raise RunError(f"{file}: {unknown(key, str(index[key]), known)}")
    for name, about in index["slices"].items():
        if not is_name(name):
            raise RunError(f"{file}: slices: {name!r} is no name")
        shaped(about, _SLICE, f"{file}: {name}")
        shaped(about["sub_adapter"], dict.fromkeys(about["sub_adapter"], int), f"{file}: {name}")
        some = {key: float for key in _CHOSEN_BY if about.get(key) is not None}
        shaped(about, some, f"{file}: {name}")
    return dict(index)


@torch.no_grad()
def load(
    directory: Path | str,
    name: str,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    base: str | None = None,
) -> PreTrainedModel:
    """The slice of this name, in the type that it is stored in; RunError where there is none, or
    where files are damaged. Nothing in the folder is run as code unless that is allowed. `base`:
    where the base model of a folder is now that refers to it; BaseMismatch if it is another."""
    directory = Path(directory)
    index = read(directory)
    about = about_of(directory, index, name)
    found = base_of(directory, index, trust_remote_code=trust_remote_code, base=base)
    config = found.config
    dtype = loading.resolve_dtype(config.dtype, torch.device("cpu"))
    net = found.net(loading.skeleton(config, dtype), directory)
    own = own_tensors(directory, name) if about["own"] else {}
    whole = loading.load_model(config.path, config)
    take_settings_(net.model, whole)
    factors = read_factors(directory / ADAPTER) if net.head else {}
    sub = net.space.check(SubAdapter(tuple(about["sub_adapter"].items())))
    head = {key: factors[key] for key in net.head}
    made_of = streamed(whole, net, sub, head, is_ordered=found.is_ordered)
    model, made = made_of.model, dict(made_of.tensors)
    require_known(directory, name, own, made)
    made |= own
    tied = model.all_tied_weights_keys
    for key, empty in model.state_dict(keep_vars=True).items():
        if key not in tied or tied[key] not in made:
            kind = dtype if empty.is_floating_point() else empty.dtype
            tensor: Tensor = made[key]().to(device, kind).contiguous()
            put_(model, key, nn.Parameter(tensor) if isinstance(empty, nn.Parameter) else tensor)
    model.tie_weights()
    configure_(model, hf.described_config(model, code=False))
    return says_its_sizes_(model).to(device).eval()


def about_of(directory: Path, index: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the index says of a slice; RunError where there is none of this name."""
    if name not in index["slices"]:
        raise RunError(f"{directory}: {unknown('slice', name, index['slices'])}")
    return dict(index["slices"][name])


@dataclass(frozen=True)
class Base:
    """The base model of a folder."""

    config: ModelConfig
    """How it is loaded, from a folder on this machine."""
    digest: str
    is_ordered: bool
    """Whether its channels stand in the order of the super-adapter's."""

    def net(self, model: PreTrainedModel, directory: Path) -> Supernet:
        """The supernet over it, or over its modules without data."""
        folder = directory / ADAPTER
        return load_super_adapter(model, self.digest, folder, is_ordered=self.is_ordered)


def base_of(
    directory: Path,
    index: Mapping[str, Any],
    *,
    trust_remote_code: bool,
    device: str = "cpu",
    base: str | None = None,
) -> Base:
    """The base in the folder, or the one that it refers to, here or at `base`: RunError where that
    is not found, BaseMismatch if it is another, ConfigError for a place of what is in the folder.
    Weights are read to compare them, not loaded."""
    about = read_about(directory / ADAPTER)
    copied, digest = index["base"] == COPY, about["base_digest"]
    if copied and base is not None:
        raise ConfigError(f"{directory}: base {base}: the base is in the folder; leave it out")
    path = str(directory / BASE)
    if not copied:
        try:
            path = loading.locate(base or about["base_model"])
            digest = digest_of(path)
        except ModelError as error:
            raise RunError(
                f"{directory}: its base model is not in the folder, and cannot be had: {error}; "
                "elastic.load(folder, base=PATH) says where it is"
            ) from None
        read_super_adapter(directory / ADAPTER, digest)
    config = ModelConfig(
        path=path, dtype=index["dtype"], device=device, head=index["head"],
        classes=index["classes"], trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return Base(config, digest, copied)


def own_tensors(directory: Path, name: str) -> dict[str, Callable[[], Tensor]]:
    """What makes the tensors that a slice has of its own, by their names in its model; RunError for
    a damaged file."""
    file = directory / f"{name}.safetensors"
    try:
        tensors = safe_open(file, "pt")
        return {key: functools.partial(tensors.get_tensor, key) for key in list(tensors.keys())}
    except (SafetensorError, OSError) as error:
        raise RunError(f"{file}: damaged, or not there: {one_line(error)}") from None


def require_known(
    directory: Path, name: str, own: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    """RunError unless a slice has all that is its own."""
    if strange := sorted(set(own) - set(expected)):
        raise RunError(
            f"{directory / name}.safetensors: {strange[0]} is no tensor of this slice; the file is "
            "of another"
        )


def _card(index: Mapping[str, Any], auto: str | None, referred: str | None) -> str:
    """What the folder is, to a stranger; `referred` is where its base is."""
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
    more = _WITH_TRANSFORMERS.format(auto=auto) if auto else ""
    if referred is not None:
        more = _REFERRED.format(base=referred)
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{_CARD}{more}{_FIGURES}{table}"


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
_REFERRED = """
The base model is not in this folder. It is looked for at `{base}`, or where
`elastic.load("this/folder", base="its/folder")` says.
"""
_FIGURES = """
Numbers of parameters, accuracy on examples that chose nothing, and time to the first token:

"""


def _csv(index: Mapping[str, Any], net: Supernet) -> str:
    """A row for every slice, a column for every latency; behind those that mistral.rs reads, where
    they can say the sizes."""
    columns = [
        (f"{key} ({table['device']}, {table['runtime']})", table, key)
        for table in index["latencies"]
        for key in LATENCIES
    ]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    sizes = matformer.rows(net, index["slices"])
    more = matformer.COLUMNS if sizes else ()
    rows.writerow(["slice", *FIGURES, "low", "high", *(title for title, *_ in columns), *more])
    for name, about in index["slices"].items():
        low, high = about.get("accuracy_interval") or ("", "")
        timed = [table["slices"].get(name, {}).get(key, "") for _, table, key in columns]
        own = sizes[name] if sizes else []
        rows.writerow([name, *(about.get(key, "") for key in FIGURES), low, high, *timed, *own])
    return text.getvalue()
