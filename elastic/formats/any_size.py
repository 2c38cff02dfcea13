"""One size of a folder that has every size, loaded with torch, transformers and safetensors alone.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, budget={"prefill_ms": 25})

Such a folder has copies of this file and of the one beside it, below two classes for its family of
models, so nothing of this package is imported but that one. `elastic.load` never runs the copies.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .choosing import (
    FULL,
    NotKnown,
    Timed,
    best_of,
    choose,
    device_name,
    limits_of,
    milliseconds,
    tables_of,
    timed_here,
)

VERSION = 1
INDEX, SIZES, BASE, FACTORS, ORDER = (
    "slices.json", "sizes.json", "base", "super_adapter/factors.safetensors",
    "super_adapter/order.safetensors",
)  # fmt: skip
COPY = "copy"
"""Of a base that is in the folder."""


class AnySize:
    """What stands ahead of a model class of transformers, for `from_pretrained` to take one size of
    a folder that has several. A folder of one size, such as a saved slice, loads as any other."""

    @classmethod
    def from_pretrained(
        cls,
        folder: Any,
        *args: Any,
        slice: str | None = None,
        budget: Any = None,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The slice of this name, the one that meets this budget on this device, or what the search
        chose; the other arguments are those of transformers. ValueError where there is none, or
        where the base is in another folder."""
        if slice is not None and budget is not None:
            raise ValueError("slice and budget: the one or the other names the size")
        place = Path(folder)
        if not place.is_dir():
            names = ("revision", "token", "cache_dir", "local_files_only")
            place = Path(snapshot_download(folder, **{k: kwargs[k] for k in names if k in kwargs}))
        if not (place / INDEX).is_file():
            if slice is not None or budget is not None:
                raise ValueError(f"{folder}: no {INDEX}, so there is one size alone")
            return super().from_pretrained(folder, *args, config=config, **kwargs)  # type: ignore[misc]
        index = _read(place / INDEX)
        family: Any = cls.__mro__[cls.__mro__.index(AnySize) + 1]
        config = config or cls.config_class.from_pretrained(place)  # type: ignore[attr-defined]

        def load(name: str, **kwargs: Any) -> Any:
            sizes = _read(place / SIZES)["slices"][name]
            sized = copy.deepcopy(config)
            _say_sizes_(sized, sizes["config"])
            own = place / f"{name}.safetensors" if index["slices"][name]["own"] else None
            with torch.device("cpu"), torch.no_grad(), _named(place / BASE):
                base = family.from_pretrained(place / BASE, dtype=getattr(torch, index["dtype"]))
            with torch.no_grad():
                state = _state(sizes, base, place / FACTORS, own)
                if "head" in sizes:
                    state |= _head(sizes["head"], base, place / ORDER)
            found = super(AnySize, cls).from_pretrained(  # type: ignore[misc]
                None, *args, config=sized, state_dict=state, **kwargs
            )
            model = found[0] if isinstance(found, tuple) else found
            model.config.name_or_path = model.name_or_path = str(folder)
            if base.can_generate():
                model.generation_config = base.generation_config
            return found

        if slice is None:
            slice = best_of(index)
            if budget is not None:
                slice = _within(place, index, budget, kwargs.get("device_map"), load)
            _say(f"{folder}: {slice}")
        if slice not in index["slices"]:
            raise NotKnown(f"{place}: no slice {slice!r}; choose from {', '.join(index['slices'])}")
        return load(slice, **kwargs)


def _say_sizes_(config: Any, words: Mapping[str, Any]) -> None:
    """Put these words into a configuration, those about a part of the model into that part's."""
    for key, value in words.items():
        part = getattr(config, key, None)
        if isinstance(value, Mapping) and isinstance(part, PretrainedConfig):
            _say_sizes_(part, value)
        else:
            setattr(config, key, value)


def _say(text: str) -> None:
    logging.get_logger(__name__).warning(text)


def _within(
    place: Path, index: Mapping[str, Any], budget: Any, device_map: Any, load: Callable[..., Any]
) -> str:
    """The name of the slice that meets the budget where the model is to be."""
    limits, here = limits_of(budget), "cpu"
    if device_map is not None:
        first = next(iter(device_map.values())) if isinstance(device_map, Mapping) else device_map
        here = f"cuda:{first}" if isinstance(first, int) else str(first)
        if here in ("auto", "balanced", "balanced_low_0", "sequential"):
            here = "cuda" if torch.cuda.is_available() else "cpu"
    tables = [
        Timed(*(table[name] for name in Timed.__dataclass_fields__)) for table in tables_of(index)
    ]

    def measure(table: Timed) -> dict[str, float]:
        return milliseconds(load(FULL).to(here), table)

    timed = timed_here(tables, limits, device_name(here), measure, str(place), _say)
    return choose(index["slices"], timed, limits, str(place))


def _read(file: Path) -> dict[str, Any]:
    """ValueError for what is damaged, of another version, or has its base elsewhere."""
    with _named(file):
        found = json.loads(file.read_text(encoding="utf-8"))
    if found.get("version", VERSION) != VERSION:
        raise ValueError(
            f"{file}: version {found['version']}, and the code beside it reads {VERSION}; get all "
            "files of the folder anew"
        )
    if found.get("base", COPY) != COPY:
        raise ValueError(
            f"{file}: the base is not in this folder; pip install elastic-adapters, whose "
            "elastic.load finds it, or export with --slices.base copy"
        )
    return dict(found)


def _state(
    sizes: Mapping[str, Any], base: Any, factors_in: Path, own_in: Path | None
) -> dict[str, Tensor]:
    """The tensors of a slice, by their names in its model, from a base that is mapped into memory:
    of its files what stays is read."""
    found: dict[str, Tensor] = {}
    with ExitStack() as files:
        factors = _tensors(files, factors_in)
        own = _tensors(files, own_in) if own_in else {}
        for old, tensor in base.state_dict().items():
            new = _renamed(sizes["blocks"], old)
            if new is None:
                continue
            site, _, leaf = old.rpartition(".")
            turned = leaf == "weight" and isinstance(base.get_submodule(site), Conv1D)
            made = tensor.T if turned else tensor
            if new in own:
                made = own[new]()
            elif site in sizes["layers"]:
                rows, columns, rank = sizes["layers"][site]
                made = _leading(made, 0, rows)
                if leaf == "weight":
                    made = _leading(made, 1, columns)
                if leaf == "weight" and rank:
                    A = _leading(factors[f"{site}.A"]()[:rank], 1, columns).contiguous()
                    B = _leading(factors[f"{site}.B"]()[:, :rank], 0, rows).contiguous()
                    # Summed in float32 or wider and rounded once.
                    wide = torch.promote_types(tensor.dtype, torch.float32)
                    made = torch.addmm(made.to(wide), B.to(wide), A.to(wide))
            found[new] = (made.T if turned else made).to(tensor.dtype).contiguous()
    return found


def _head(sizes: Mapping[str, Any], base: Any, order_in: Path) -> dict[str, Tensor]:
    """The tensors of a head that computes the first tokens of an order alone: its rows, and where
    every token has its own."""
    site, kept = sizes["site"], sizes["tokens"]
    with ExitStack() as files:
        order = _tensors(files, order_in)[sizes["order"]]()
    places = torch.full((len(order),), kept, dtype=torch.int32)
    places[order[:kept]] = torch.arange(kept, dtype=torch.int32)
    rows = base.get_submodule(site).state_dict().items()
    return {f"{site}.{leaf}": tensor[order[:kept]].contiguous() for leaf, tensor in rows} | {
        f"{site}.places": places
    }


def _leading(tensor: Tensor, axis: int, left: int | Sequence[Sequence[int]]) -> Tensor:
    """So many of the first rows or columns; of an axis of several parts each (start, length)."""
    parts = [(0, left)] if isinstance(left, int) else left
    pieces = [tensor.narrow(axis, start, length) for start, length in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)


def _renamed(blocks: Mapping[str, Sequence[int]], name: str) -> str | None:
    """What a tensor is called where only these blocks of every list are left; None: it is gone."""
    for stack, left in blocks.items():
        if name.startswith(f"{stack}."):
            number, _, rest = name.removeprefix(f"{stack}.").partition(".")
            return f"{stack}.{left.index(int(number))}.{rest}" if int(number) in left else None
    return name


def _tensors(files: ExitStack, file: Path) -> dict[str, Callable[[], Tensor]]:
    """What reads each; ValueError for a damaged file."""
    with _named(file):
        opened = files.enter_context(safe_open(file, "pt"))
        return {name: partial(opened.get_tensor, name) for name in list(opened.keys())}


@contextmanager
def _named(place: Path) -> Iterator[None]:
    """ValueError for what cannot be read there."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{place}: damaged, or not there: {error}") from None
