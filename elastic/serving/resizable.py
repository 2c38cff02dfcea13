"""A model whose size is changed while it runs: one copy of the weights, of which every size takes
the leading rows and columns. Super-adapters of several tasks may share them."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from elastic.adapters.layers import ElasticLinear, reorder_linear
from elastic.errors import RunError
from elastic.formats import slices
from elastic.formats.choosing import FULL
from elastic.models.modules import modules_of, plain_linear
from elastic.spaces.bound import SubAdapter
from elastic.spaces.dims import DEPTH
from elastic.supernet.compact import merged_weight
from elastic.supernet.depth import Blocks, renamed
from elastic.supernet.supernet import Supernet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from elastic.serving.load import Folder

CACHED = ("heads", DEPTH)
"""Dimensions that a KV cache depends on."""
CACHES = ("past_key_values", "cache")
"""What versions of transformers call it."""


class Sizes:
    """The slices of one folder in a model, of which one is active."""

    def __init__(self, folder: Folder, shared: Shared, name: str) -> None:
        """The model is left with this slice active."""
        self.folder, self.shared = folder, shared
        self.names = tuple(folder.index["slices"])
        shared.leave()
        model = shared.model
        # Where channels stand is the business of what is shared.
        self.net = replace(folder.base, is_ordered=True).net(model, folder.path)
        self.order = {} if folder.base.is_ordered else self.net.permutations()
        model.eval()
        self._subs = {
            name: self.net.space.check(SubAdapter(tuple(about["sub_adapter"].items())))
            for name, about in folder.index["slices"].items()
        }
        self._elastic = dict(modules_of(model, ElasticLinear))
        self._blocks = dict(modules_of(model, Blocks))
        self._parents = {
            site: (model.get_submodule(site.rpartition(".")[0]), site.rpartition(".")[2])
            for site in (*self._elastic, *self._blocks)
        }
        self._head = {site: value.detach().clone() for site, value in self.net.head.items()}
        self._own: dict[str, dict[str, nn.Linear]] = {name: {} for name in self.names}
        self.current = FULL
        shared.enter(self)
        if shared.is_alone and not any(group.dim == "rank" for group in self.net.space):
            _merge_(self.net)
        self._own = {
            name: self._layers_of(name) if about["own"] else {}
            for name, about in folder.index["slices"].items()
        }
        self._put(name)

    @torch.no_grad()
    def _layers_of(self, name: str) -> dict[str, nn.Linear]:
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
        tensors = slices.own_tensors(self.folder.path, name)
        slices.require_known(self.folder.path, name, tensors, expected)
        for key, make in tensors.items():
            site, leaf = expected[key]
            made.setdefault(site, {})[leaf] = make().to(self.shared.model.device)
        with self.net.active(sub):
            for site, own in made.items():
                layer = self._elastic[site]
                bias = own.get("bias", layer.bias)
                found[site] = plain_linear(
                    own.get("weight", layer.weight).clone(), None if bias is None else bias.clone()
                )
        return found

    def _place(self, modules: Mapping[str, nn.Module]) -> None:
        for site, module in modules.items():
            parent, leaf = self._parents[site]
            setattr(parent, leaf, module)

    def _put(self, name: str) -> None:
        """Make a slice the active one."""
        self._place({site: self._elastic[site] for site in self._own[self.current]})
        self.net.activate(self._subs[name])
        self._place(self._own[name])
        self.current = name

    @torch.no_grad()
    def enter(self) -> None:
        """Stand in the model, whose layers are plain, as when this was last active."""
        self._place(self._blocks)
        self._place(self._elastic)
        for site, value in self._head.items():
            self.net.head[site].copy_(value)
        self._put(self.current)

    def leave(self) -> None:
        """Leave plain layers and all blocks behind."""
        current = self.current
        self._put(FULL)
        self._place({site: layer.base for site, layer in self._elastic.items()})
        self.current = current

    def resize(self, wanted: Any) -> str:
        """The slice of this name, or the one that meets this budget, becomes the active one; waits
        for whoever holds another. Returns its name."""
        name = self._named(wanted)
        with self.shared.lock:
            self.shared.enter(self)
            if name != self.current:
                self._put(name)
        return name

    @contextlib.contextmanager
    def at(self, wanted: Any) -> Iterator[PreTrainedModel]:
        """The same while the block lasts, in which no other thread changes or runs the model."""
        name = self._named(wanted)
        with self.shared.lock:
            last, before = self.shared.active, self.current
            self.shared.enter(self)
            self._put(name)
            try:
                yield self.shared.model
            finally:
                self.shared.enter(self)  # the block may have gone over to another task
                self._put(before)
                self.shared.enter(last)

    def _named(self, wanted: Any) -> str:
        return wanted if wanted in self.names else self.folder.within(wanted)

    def layers(self) -> Iterator[nn.Module]:
        """All that this super-adapter has of its own, active or not, around layers of the base."""
        yield from self._elastic.values()
        for own in self._own.values():
            yield from own.values()

    def cached(self, name: str) -> list[int]:
        """What a slice has that a cache depends on."""
        return [self._subs[name][group.name] for group in self.net.space if group.dim in CACHED]


class Shared:
    """A base model in memory, and the super-adapters on it, of which one is active."""

    def __init__(self, model: PreTrainedModel, *, is_alone: bool) -> None:
        self.model, self.is_alone = model, is_alone
        self.lock = threading.RLock()
        self.adapters: dict[str, Sizes] = {}
        """By the names of their tasks."""
        self.active: Sizes | None = None
        self._order: Mapping[tuple[str, str], Tensor] = {}
        """Which channel of the base as it is stored stands at each place, by layer and axis."""
        self._filled: WeakKeyDictionary[Any, tuple[Sizes, str]] = WeakKeyDictionary()
        """By KV cache, the slice that filled it."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has a lock of its own, which no thread holds."""
        vars(self).update(state)
        self.lock = threading.RLock()

    def enter(self, sizes: Sizes | None) -> None:
        """Let this super-adapter be the active one. Where it has another order of channels than
        the one before, the base is permuted in place: one pass over the layers that are cut."""
        if sizes is self.active or sizes is None:
            return
        self.leave()
        self._arrange(sizes.order)
        sizes.enter()
        self.active = sizes

    def leave(self) -> None:
        """The base model alone."""
        if self.active is not None:
            self.active.leave()
            self.active = None

    def _arrange(self, order: Mapping[tuple[str, str], Tensor]) -> None:
        for site, axis in dict.fromkeys((*self._order, *order)):
            layer = self.model.get_submodule(site)
            base = layer.base if isinstance(layer, ElasticLinear) else layer
            as_stored = torch.arange(base.out_features if axis == "out" else base.in_features)
            now = self._order.get((site, axis), as_stored)
            index = now.argsort()[order.get((site, axis), as_stored)]
            if not torch.equal(index, as_stored):
                reorder_linear(base, axis, index)
        self._order = order

    def check(self, cache: Any) -> None:
        """RunError for a KV cache that another super-adapter has filled, or a slice with other
        blocks or heads; another width of an MLP leaves no trace in it."""
        sizes = self.active
        if cache is None or sizes is None:
            return
        now = (sizes, sizes.current)
        if not cache.get_seq_length():
            self._filled[cache] = now
            return
        before, name = self._filled.setdefault(cache, now)
        if before is not sizes:
            raise RunError(
                f"past_key_values: {name} of another super-adapter filled them; begin anew, or go "
                "on with that one"
            )
        if sizes.cached(name) != sizes.cached(sizes.current):
            raise RunError(
                f"past_key_values: {name} filled them, which has other blocks or key-value heads "
                f"than {sizes.current}; begin anew, or go on at the size that filled them"
            )


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

    shared: Shared

    @property
    def sizes(self) -> Sizes:
        """Those of the active super-adapter."""
        assert self.shared.active is not None
        return self.shared.active

    @property
    def adapters(self) -> Mapping[str, Sizes]:
        """By task, each with `resize` and `at`, which make it the active one."""
        return self.shared.adapters

    def resize(self, wanted: Any) -> str:
        """Become the slice of this name, or the one that meets this budget; gives its name. Waits
        until nobody generates or holds a size (`at`)."""
        return self.sizes.resize(wanted)

    @contextlib.contextmanager
    def at(self, wanted: Any) -> Iterator[Any]:
        """Be that slice inside the block, which no other thread can change; then the one before."""
        with self.sizes.at(wanted):
            yield self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `to`, `half` and their like do to a model, also to what other sizes have instead of
        some of its layers. Waits until nobody generates or holds a size."""
        with self.shared.lock:
            super()._apply(fn, recurse)  # type: ignore[misc]
            for sizes in self.adapters.values():
                head = sizes.net.vocabulary
                for layer in (*sizes.layers(), *([head.whole] if head else [])):
                    layer._apply(fn)
        return self

    def save_pretrained(self, save_directory: Any, *_: Any, **__: Any) -> None:
        """RunError: the folder that it was loaded from is this model."""
        raise RunError(
            f"{save_directory}: a resizable model is saved as one size: "
            f"elastic.load(folder, slice={self.sizes.current!r}).save_pretrained(...)"
        )


def _alone(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the model in which no other thread changes its size; with the signature that
    transformers looks at."""

    @functools.wraps(method)
    def held(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.shared.lock:
            for name in CACHES:
                self.shared.check(kwargs.get(name))
            return method(self, *args, **kwargs)

    return held


def resizable(model: PreTrainedModel, folders: Mapping[str, tuple[Folder, str]]) -> PreTrainedModel:
    """A base model with all slices of these folders, by the names of their tasks; of each the named
    slice, of all the first is active."""
    shared = Shared(model, is_alone=len(folders) == 1)
    for task, (folder, name) in folders.items():
        shared.adapters[task] = Sizes(folder, shared, name)
    shared.enter(next(iter(shared.adapters.values())))
    plain = type(model)
    alone = {name: _alone(getattr(plain, name)) for name in ("forward", "generate")}
    model.__class__ = type(f"Resizable{plain.__name__}", (Resizable, plain), alone)
    model.shared = shared
    return model
