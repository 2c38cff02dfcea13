"""A compact model made one tensor at a time, from base weights that stay on disk.

A model loaded in the type it was saved in is mapped into memory, not read: its pages come and go.
What is cut of a tensor, permuted and merged exists from when it is asked for until it is written,
so a compact model can be written by a machine that holds neither it nor its base. It can be run
there, too: each block has its tensors while it runs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastic.adapters.experts import (
    ElasticExperts,
    ExpertSize,
    MixtureLayers,
    expert_index,
    reordered,
)
from elastic.adapters.layers import ElasticLinear, Size
from elastic.models.modules import modules_of, put_
from elastic.spaces.bound import SubAdapter
from elastic.supernet.compact import merged_weight, part_, sliced, wide_type
from elastic.supernet.depth import original
from elastic.supernet.supernet import Supernet


@dataclass(frozen=True)
class Streamed:
    """A compact model, each of whose tensors is made whenever it is asked for."""

    model: PreTrainedModel
    """Its modules and sizes, without data (meta) but for buffers that no file has."""
    tensors: dict[str, Callable[[], Tensor]]
    """By the name that the state of the model has for it."""

    @contextlib.contextmanager
    def runnable(self, blocks: Sequence[str]) -> Iterator[None]:
        """Inside, the model computes, in float32 at least: what stands outside of these blocks is
        in memory, and of them the one that runs."""
        inside = tuple(f"{name}." for name in blocks)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._made([n for n in self.tensors if not n.startswith(inside)]))
            for name in blocks:
                self._present_while_it_runs(name, stack)
            yield

    def _present_while_it_runs(self, name: str, stack: contextlib.ExitStack) -> None:
        block, running = self.model.get_submodule(name), contextlib.ExitStack()
        before = block.register_forward_pre_hook(
            lambda *_: running.enter_context(self.present(name))
        )
        behind = block.register_forward_hook(lambda *_: running.close())
        for end in (before.remove, behind.remove, running.close):
            stack.callback(end)

    @contextlib.contextmanager
    def present(self, name: str, changes: Path | None = None) -> Iterator[None]:
        """Inside, the module of this name has its tensors, which are made once. Those that were
        replaced by the end stay so: they are kept in the directory `changes`."""
        with self._made([n for n in self.tensors if n.startswith(f"{name}.")], changes):
            yield

    @contextlib.contextmanager
    def _made(self, names: Sequence[str], changes: Path | None = None) -> Iterator[None]:
        state = self.model.state_dict(keep_vars=True)
        absent = {name: state[name] for name in names if state[name].is_meta}
        made = {}
        for name, empty in absent.items():
            tensor = self.tensors[name]()
            tensor = tensor.to(wide_type(tensor))
            if isinstance(empty, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            made[name] = tensor
            put_(self.model, name, tensor)
        try:
            yield
            now = self.model.state_dict(keep_vars=True)
            for name in [name for name in made if now[name] is not made[name]]:
                assert changes is not None, name
                file = changes / f"{name}.safetensors"
                save_file({name: now[name].detach()}, file)
                self.tensors[name] = functools.partial(_read, file, name)
        finally:
            for name, empty in absent.items():
                put_(self.model, name, empty)


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)


def streamed(
    base: PreTrainedModel,
    net: Supernet,
    sub: SubAdapter,
    head: Mapping[str, Tensor] | None = None,
    degree: float = 0.0,
    *,
    is_ordered: bool = False,
    merged: bool = True,
) -> Streamed:
    """What `compact` would give, bit for bit; unless `merged`, without the update.

    `net` is the super-adapter's supernet over a model without data (meta), with its order and its
    factors; `base` has the weights, in their own order unless it `is_ordered` as the supernet is;
    `head` what was trained of a classifier's.
    """
    head = head or {}
    sub = net.space.check(sub)
    model = sliced(net, sub, degree)
    updates = {name: pair for name, pair in part_(model).items() if merged}
    left, kept = _left(net, sub, degree, is_ordered), net.space.kept(sub)
    if net.vocabulary and net.space.cuts_vocabulary(sub):
        group = net.vocabulary.group
        # The head is never permuted: it may be the embeddings.
        left[group.head] = _Kept(net.vocabulary.tokens(sub[group.name]))

    experts = _experts(net, sub, degree, is_ordered)

    def made(name: str) -> Tensor:
        site, _, leaf = name.rpartition(".")
        source = original(kept, site)
        if leaf == "places":  # of the head, which no file has
            return model.get_buffer(name)
        tensor = head.get(name)
        if tensor is None:
            tensor = getattr(base.get_submodule(source), leaf)
        if f"{source}.{leaf}" in experts:
            tensor = experts[f"{source}.{leaf}"](tensor)
        if source in left:
            tensor = left[source](tensor, leaf)
        if name in updates:
            tensor = merged_weight(tensor, *updates[name])
        return tensor.detach()

    names = model.state_dict()
    for name, _ in list(model.named_buffers()):
        if name not in names:
            put_(model, name, made(name))
    return Streamed(model, {name: torch.no_grad()(lambda name=name: made(name)) for name in names})


def take_settings_(model: PreTrainedModel, base: PreTrainedModel) -> None:
    """Give a model without data what its own class does not know of the base: how it pads and
    generates."""
    if hasattr(base.config, "pad_token_id"):  # of a wrapper its language model may say it alone
        model.config.pad_token_id = base.config.pad_token_id
    if base.can_generate():
        model.generation_config = base.generation_config


@dataclass(frozen=True)
class _Cut:
    """What is left of one layer's tensors, from how the base has them."""

    size: Size
    rows: Tensor | None
    """The base's, in the supernet's order; None: as they stand."""
    columns: Tensor | None

    def __call__(self, tensor: Tensor, leaf: str) -> Tensor:
        size, rows, columns = self.size, self.rows, self.columns
        if leaf == "weight" and size.made_up is not None:  # those that go are read, too
            tensor = size.compensated_columns(tensor if columns is None else tensor[:, columns])
            return size.leading(tensor if rows is None else tensor[rows])
        tensor = size.leading(tensor) if rows is None else tensor[size.leading(rows)]
        if leaf != "weight":
            return tensor
        if columns is None:
            return size.leading_columns(tensor)
        return tensor[:, size.leading_columns(columns[None])[0]]


@dataclass(frozen=True)
class _Kept:
    """What is left of a head."""

    tokens: Tensor

    def __call__(self, tensor: Tensor, leaf: str) -> Tensor:
        return tensor[self.tokens]


def _experts(
    net: Supernet, sub: SubAdapter, degree: float, is_ordered: bool
) -> dict[str, Callable[[Tensor], Tensor]]:
    """By tensor of experts and of their routers, what is left of how the base has it."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    with net.active(sub, degree):
        for name, mixture in net.mixtures.items():
            orders = (None, None) if is_ordered else net.expert_orders(name)
            for site, module in mixture.modules.items():
                size = copy.copy(module.size)
                for leaf in module.tensors():
                    found[f"{site}.{leaf}"] = functools.partial(_cut, module, leaf, orders, size)
            for held in mixture.beside:
                choice = mixture.experts.size.experts
                found[held] = functools.partial(_beside, mixture, orders[0], choice)
    return found


def _beside(mixture: MixtureLayers, order: Tensor | None, choice: int, tensor: Tensor) -> Tensor:
    tensor = tensor if order is None else tensor[expert_index(order)]
    return mixture.cut_beside(tensor, choice)


def _cut(
    module: ElasticExperts,
    name: str,
    orders: tuple[Tensor | None, Tensor | None],
    size: ExpertSize,
    tensor: Tensor,
) -> Tensor:
    return module.cut(name, reordered(tensor, name, module.axes, *orders), size)


def _left(
    net: Supernet, sub: SubAdapter, degree: float, is_ordered: bool
) -> dict[str, Callable[[Tensor, str], Tensor]]:
    """By elastic layer."""
    moved = {} if is_ordered else net.permutations()
    with net.active(sub, degree):
        return {
            site: _Cut(copy.copy(layer.size), moved.get((site, "out")), moved.get((site, "in")))
            for site, layer in modules_of(net.model, ElasticLinear)
        }
