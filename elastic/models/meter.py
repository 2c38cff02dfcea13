"""Operations and memory of whatever runs inside a block, on real tensors or on fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten
_KERNELS = "flash", "efficient", "cudnn"


def _of_groups(formula: Callable[..., int], query: int) -> Callable[..., int]:
    """With as many heads of keys and values as of queries (the argument at place `query`): several
    queries may share theirs, which is no fewer operations and which torch before 2.13 refuses to
    count."""

    def counted(*arguments: Any, **settings: Any) -> int:
        heads = arguments[query].shape[1]
        shared = [(x.shape[0], heads, *x.shape[2:]) for x in arguments[query + 1 : query + 3]]
        rest = arguments[query + 3 :]
        return formula(*arguments[: query + 1], *shared, *rest, **settings)

    return counted


def _attention() -> Iterator[tuple[Any, Callable[..., int]]]:
    """Kernels, and the formulas for them."""
    for kernel in _KERNELS:
        for place, direction in enumerate(("", "_backward")):
            name = f"_scaled_dot_product_{kernel}_attention"
            formula = _of_groups(flop_registry[getattr(_ATEN, name + direction)], place)
            yield getattr(_ATEN, name + direction), formula
            if kernel == "flash":  # the CPU's, for which torch has none
                yield getattr(_ATEN, f"{name}_for_cpu{direction}"), formula


FLOPS = {**flop_registry, **dict(_attention())}
"""Floating-point operations by operator, as torch's FlopCounterMode counts them: two for a
multiply-accumulate, none for what is not a matrix product."""


class Meter(TorchDispatchMode):
    """Counts beside `given`, the tensors that were there before.

        with Meter(model.parameters()).recording() as meter:
            loss().backward()

    A memory figure is a sum over storages, in bytes; what a kernel takes inside is not seen.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.flops = 0
        self.saved = 0
        """What the forward pass left for the backward pass."""
        self.peak = 0
        """The most that lived at once."""
        self._live = 0
        self._known = {id(tensor.untyped_storage()) for tensor in given}
        self._saved = set(self._known)

    @contextmanager
    def recording(self) -> Iterator[Meter]:
        with self, saved_tensors_hooks(self._save, lambda tensor: tensor):
            yield self

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: Any = (), settings: Any = None
    ) -> Any:
        if operator is torch.ops.prim.device.default:  # of a fake tensor, asked all the time
            return arguments[0].fake_device
        settings = settings or {}
        result = operator(*arguments, **settings)
        if formula := FLOPS.get(getattr(operator, "overloadpacket", None)):
            self.flops += formula(*arguments, **settings, out_val=result)
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor) and not tensor.is_meta:  # which takes no memory at all
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        # torch keeps a storage's Python object, and with it this id, as long as the storage.
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._saved.discard(key)
        self._live -= size

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self._saved:
            self._saved.add(id(storage))
            self.saved += storage.nbytes()
        return tensor
