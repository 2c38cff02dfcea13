"""A model whose size is changed while it runs: one copy of the weights, of which every size takes
the leading rows and columns."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from elastic.adapters.layers import ElasticLinear
from elastic.errors import RunError
from elastic.formats import slices
from elastic.models import loading
from elastic.models.modules import modules_of, plain_linear
from elastic.spaces.bound import SubAdapter
from elastic.spaces.dims import DEPTH
from elastic.supernet.compact import merged_weight
from elastic.supernet.depth import renamed
from elastic.supernet.supernet import Supernet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Sizes:
    """The slices of a folder in one model, of which one is active."""

    def __init__(
        self, folder: Path, name: str, choose: Callable[[Any], str], **settings: Any
    ) -> None:
        """`choose` gives the name of the slice that meets a budget; settings are those of
        `elastic.formats.slices.base_of`."""
        index = slices.read(folder)
        self.names = tuple(index["slices"])
        self.choose = choose
        self.lock = threading.RLock()
        found = slices.base_of(folder, index, **settings)
        self.net = found.net(loading.load_model(found.config.path, found.config), folder)
        self.model = self.net.model.eval()
        if not any(group.dim == "rank" for group in self.net.space):
            _merge_(self.net)
        self._subs = {
            name: self.net.space.check(SubAdapter(tuple(about["sub_adapter"].items())))
            for name, about in index["slices"].items()
        }
        self._places = {
            site: (self.model.get_submodule(site.rpartition(".")[0]), site.rpartition(".")[2])
            for site, _ in modules_of(self.model, ElasticLinear)
        }
        self._elastic = {site: self.net.layer(site) for site in self._places}
        self._own = {
            name: self._layers_of(folder, name) if about["own"] else {}
            for name, about in index["slices"].items()
        }
        self._filled: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        """By KV cache, the slice that filled it."""
        self.current = name
        self._put(name)

    @torch.no_grad()
    def _layers_of(self, folder: Path, name: str) -> dict[str, nn.Linear]:
        """What a slice has of its own, by where it stands in the whole model."""
        sub, found = self._subs[name], {}
        kept = self.net.space.kept(sub)
        expected = {
            f"{small}.{leaf}": (site, leaf)
            for site in self._elastic
            if (small := renamed(kept, site)) is not None
            for leaf in ("weight", "bias")
        }
        made: dict[str, dict[str, Tensor]] = {}
        for key, make in slices.own_tensors(folder, name, expected).items():
            site, leaf = expected[key]
            made.setdefault(site, {})[leaf] = make().to(self.model.device)
        with self.net.active(sub):
            for site, own in made.items():
                layer = self._elastic[site]
                bias = own.get("bias", layer.bias)
                found[site] = plain_linear(
                    own.get("weight", layer.weight).clone(), None if bias is None else bias.clone()
                )
        return found

    def _put(self, name: str) -> None:
        """Make a slice the active one."""
        for site in self._own[self.current]:
            parent, leaf = self._places[site]
            setattr(parent, leaf, self._elastic[site])
        self.net.activate(self._subs[name])
        for site, layer in self._own[name].items():
            parent, leaf = self._places[site]
            setattr(parent, leaf, layer)
        self.current = name

    def resize(self, wanted: Any) -> str:
        """The slice of this name, or the one that meets this budget, becomes the active one; waits
        for whoever holds another. Returns its name."""
        name = wanted if wanted in self.names else self.choose(wanted)
        with self.lock:
            if name != self.current:
                self._put(name)
        return name

    @contextlib.contextmanager
    def at(self, wanted: Any) -> Iterator[PreTrainedModel]:
        """The same while the block lasts, in which no other thread changes or runs the model."""
        name = wanted if wanted in self.names else self.choose(wanted)
        with self.lock:
            before = self.current
            self._put(name)
            try:
                yield self.model
            finally:
                self._put(before)

    def check(self, cache: Any) -> None:
        """RunError for a KV cache that a slice with other blocks or heads has filled; another width
        of an MLP leaves no trace in it."""
        if cache is None:
            return
        if not cache.get_seq_length():
            self._filled[cache] = self.current
            return
        before = self._filled.setdefault(cache, self.current)
        if self._cached(before) != self._cached(self.current):
            raise RunError(
                f"past_key_values: {before} filled them, which has other blocks or key-value heads "
                f"than {self.current}; begin anew, or go on at the size that filled them"
            )

    def _cached(self, name: str) -> list[int]:
        """What a slice has that a cache depends on."""
        return [self._subs[name][group.name] for group in self.net.space if group.dim in CACHED]


CACHED = ("heads", DEPTH)
CACHES = ("past_key_values", "cache")
"""What versions of transformers call it."""


@torch.no_grad()
def _merge_(net: Supernet) -> None:
    """The whole update into the base's weights, of which every slice then takes its part: where no
    rank is cut, that is the same for all."""
    for site, adapter in net.adapters():
        layer = net.layer(site)
        A, B = adapter.factors(adapter.max_rank)
        layer.base.weight.data = merged_weight(layer.base.weight, A, B)
        layer.adapter = None


class Resizable:
    """What a model gains whose size can be changed; it goes before the model's own class."""

    sizes: Sizes

    def resize(self, wanted: Any) -> str:
        """Become the slice of this name, or the one that meets this budget; gives its name. Waits
        until nobody generates or holds a size (`at`)."""
        return self.sizes.resize(wanted)

    @contextlib.contextmanager
    def at(self, wanted: Any) -> Iterator[Any]:
        """Be that slice inside the block, which no other thread can change; then the one before."""
        with self.sizes.at(wanted):
            yield self


def _alone(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the model in which no other thread changes its size; with the signature that
    transformers looks at."""

    @functools.wraps(method)
    def held(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.sizes.lock:
            for name in CACHES:
                self.sizes.check(kwargs.get(name))
            return method(self, *args, **kwargs)

    return held


def resizable(
    folder: Path, name: str, choose: Callable[[Any], str], **settings: Any
) -> PreTrainedModel:
    """The model of a folder with all of its slices, of which one is active; settings of `Sizes`."""
    sizes = Sizes(folder, name, choose, **settings)
    model = sizes.model
    plain = type(model)
    alone = {name: _alone(getattr(plain, name)) for name in ("forward", "generate")}
    model.__class__ = type(f"Resizable{plain.__name__}", (Resizable, plain), alone)
    model.sizes = sizes
    return model
