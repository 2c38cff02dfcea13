"""Sequential compensation: a compact model is fitted, block after block, to what the full one says.

With h the compact block's own input of a layer whose columns can be cut, and e what the full
block's output has over the compact one's, both after all that came before,

    Δ = argmin ‖Δ h - e‖² + λ ‖Δ‖²,    λ = ridge · mean(h²),

is added to the layer's weight, and its bias fitted along where it has one. So a block also makes up
for what the blocks before it have lost, and one that was not cut does too. Where something stands
between the layer and the block's output, a norm or another layer, e is what the full model's own
layer says over this one. The ridge of each layer is chosen on examples held out from its fit; where
none lowers their error the layer stays as it is.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elastic.console import track
from elastic.models.kinds import Kind, kind_of
from elastic.supernet.depth import renamed, running
from elastic.supernet.fitted_experts import Seen, fit_experts_
from elastic.supernet.least_squares import Sums
from elastic.supernet.routed import given, plainly
from elastic.supernet.watching import Watching

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from elastic.spaces.bound import SubAdapter
    from elastic.supernet.streaming import Streamed
    from elastic.supernet.supernet import Supernet

HELD_OUT = 4
"""One batch in so many, the second one first, chooses the ridge."""


def can_fit(model: PreTrainedModel) -> bool:
    """Whether the blocks of this kind of model can be run one at a time."""
    return kind_of(model) is not Kind.RECURRENT


@torch.no_grad()
def fit_(
    small: PreTrainedModel, net: Supernet, sub: SubAdapter, batches: Sequence[dict[str, Tensor]]
) -> int:
    """Fit the compact model `small` of `sub`, in place, to the maximal sub-adapter; how many of its
    layers changed. `batches` are training examples, two at least, as `collate` makes them."""
    with net.active(net.space.maximal()):
        return _fit(small, net.model, net, sub, batches, lambda *_: contextlib.nullcontext())


@torch.no_grad()
def fit_streamed_(
    small: Streamed,
    whole: Streamed,
    net: Supernet,
    sub: SubAdapter,
    batches: Sequence[dict[str, Tensor]],
    changes: Path,
) -> int:
    """The same where neither is in memory: `whole` is the maximal sub-adapter, `net` its supernet
    without data. Layers that changed are kept in the directory `changes`."""

    @contextlib.contextmanager
    def present(name: str, mine: str | None) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(whole.present(name))
            if mine:
                stack.enter_context(small.present(mine, changes))
            yield

    kept = net.space.kept(sub)
    lengths = {name: len(net.model.get_submodule(name)) for name in _stacks(net)}
    blocks = [f"{name}.{number}" for name, length in lengths.items() for number in range(length)]
    left = [mine for name in blocks if (mine := renamed(kept, name))]
    with whole.runnable(blocks), small.runnable(left):
        return _fit(small.model, whole.model, net, sub, batches, present)


def _fit(
    small: PreTrainedModel,
    whole: PreTrainedModel,
    net: Supernet,
    sub: SubAdapter,
    batches: Sequence[dict[str, Tensor]],
    present: Callable[[str, str | None], contextlib.AbstractContextManager[None]],
) -> int:
    """With a block, and what is left of it, present while they are needed."""
    kept, changed = net.space.kept(sub), 0
    for blocks, sites in _stacks(net).items():
        mixtures = _by_number(blocks, net.space.mixtures)
        full, cut = _Recorded(whole, blocks, batches), _Recorded(small, blocks, batches)
        numbers = range(len(net.model.get_submodule(blocks)))
        for number in track(numbers, f"fitting {blocks}"):
            name = f"{blocks}.{number}"
            mine = renamed(kept, name)
            with present(name, mine):
                said: dict[str, list[Tensor]] = {site: [] for site in sites.get(number, ())}
                with _outputs(whole, said):
                    goals = full.run(name)
                if mine is None:
                    continue
                for site, own in said.items():
                    left = renamed(kept, site)
                    assert left is not None
                    changed += cut.fit(mine, left, goals, own)
                for experts in mixtures.get(number, ()):
                    left = renamed(kept, experts)
                    assert left is not None
                    changed += cut.fit_experts(mine, left, goals)
                cut.run(mine)
    return changed


@contextlib.contextmanager
def _outputs(model: PreTrainedModel, into: Mapping[str, list[Tensor]]) -> Iterator[None]:
    """Inside the block, what the layers of these names say."""
    handles = [
        model.get_submodule(site).register_forward_hook(
            lambda _module, _inputs, y, found=found: found.append(y)
        )
        for site, found in into.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stacks(net: Supernet) -> dict[str, dict[int, list[str]]]:
    """By list of blocks, in the model's order, and number, the layers whose columns can be cut;
    lists with mixtures that can be cut are there too."""
    order = {name: place for place, (name, _) in enumerate(net.model.named_modules())}
    named = sorted((*net.space.reading, *net.space.mixtures), key=order.__getitem__)
    lists = dict.fromkeys(match[1] for name in named if (match := _PLACE.match(name)))
    return {blocks: _by_number(blocks, sorted(net.space.reading, key=order.__getitem__))
            for blocks in lists}  # fmt: skip


_PLACE = re.compile(r"(.*?)\.(\d+)\.")


def _by_number(blocks: str, names: Iterable[str]) -> dict[int, list[str]]:
    """Those inside of one list of blocks, by the number of their block."""
    found: dict[int, list[str]] = {}
    for name in names:
        match = _PLACE.match(name)
        if match and match[1] == blocks:
            found.setdefault(int(match[2]), []).append(name)
    return found


@dataclass
class _Call:
    """How a model called its blocks on one batch."""

    hidden: Tensor
    """What enters the next block to run, (batch, ..., features)."""
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]
    """By block, beside that."""
    real: Tensor | None
    """Flat places of real tokens; None: all are."""

    def tokens(self, x: Tensor) -> Tensor:
        x = x.flatten(0, -2).float()
        return x if self.real is None else x[self.real]


class _Recorded:
    """The blocks of one model, run one at a time on what came out of the ones before."""

    def __init__(
        self, model: PreTrainedModel, blocks: str, batches: Sequence[dict[str, Tensor]]
    ) -> None:
        self.model = model
        self._known: list[Tensor] = []
        """What leaves the block that was fitted last, by batch, where that is known already."""
        watching = Watching(model)
        stack = model.get_submodule(blocks)
        assert isinstance(stack, nn.ModuleList)
        self.calls = []
        for batch in track(batches, "running the blocks"):
            inputs: list[Tensor] = []
            arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

            def note(
                name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any],
                inputs: list[Tensor] = inputs, arguments: dict[str, Any] = arguments,
            ) -> None:  # fmt: skip
                inputs += [args[0] if args else kwargs["hidden_states"]][: not inputs]
                own = {k: v for k, v in kwargs.items() if k != "hidden_states"}
                own |= {k: None for k in ("past_key_values", "past_key_value") if k in own}
                own |= {"use_cache": False} if "use_cache" in own else {}
                arguments[name] = args[1:], own

            handles = [
                block.register_forward_pre_hook(
                    lambda _, args, kwargs, name=f"{blocks}.{number}", note=note: note(
                        name, args, kwargs
                    ),
                    with_kwargs=True,
                )
                for number, block in running(stack).items()
            ]
            try:
                watching(batch)
            finally:
                for handle in handles:
                    handle.remove()
            self.calls.append(_Call(inputs[0], arguments, watching.real(blocks)))

    def _output(self, block: str, call: _Call) -> Tensor:
        args, kwargs = call.arguments[block]
        output = self.model.get_submodule(block)(call.hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def run(self, block: str) -> list[Tensor]:
        """On to behind this block; its outputs, by batch."""
        for number, call in enumerate(self.calls):
            call.hidden = self._known[number] if self._known else self._output(block, call)
        self._known = []
        return [call.hidden for call in self.calls]

    def fit(
        self, block: str, site: str, goals: Sequence[Tensor], own_goals: Sequence[Tensor]
    ) -> bool:
        """Fit one layer so that the block says what is wanted of it, or the layer itself where it
        is not the last to speak; whether it changed."""
        layer = self.model.get_submodule(site)
        assert isinstance(layer, nn.Linear)
        last = self._passes(block, layer)
        sums = [Sums(layer.bias is not None) for _ in range(2)]
        seen: list[tuple[Tensor, Tensor]] = []
        rest: list[tuple[Tensor, Tensor]] = []  # inputs, and what the block says beside this layer
        handle = layer.register_forward_hook(lambda _, inputs, y: seen.append((inputs[0], y)))
        try:
            for number, call in enumerate(self.calls):
                output = self._output(block, call)
                h, y = seen.pop()
                goal, now = (goals[number], output) if last else (own_goals[number], y)
                sums[number % HELD_OUT == 1].add(
                    call.tokens(h), call.tokens(goal) - call.tokens(now)
                )
                if last:
                    rest.append((h, output - y.view_as(output)))  # some code flattens its tokens
        finally:
            handle.remove()
        changed = sums[0].solve_(layer, held_out=sums[1])
        self._known = [beside + layer(h).view_as(beside) for h, beside in rest] if last else []
        return changed

    def fit_experts(self, block: str, site: str, goals: Sequence[Tensor]) -> bool:
        """Fit a mixture so that the block says what is wanted of it; whether it changed. Nothing is
        where something stands between it and the block's output."""
        experts = self.model.get_submodule(site)
        seen: list[list[Seen]] = [[], []]
        inputs: list[tuple[Tensor, Tensor, Tensor]] = []
        with plainly(self.model):
            if not self._passes(block, experts):
                return False
            handle = experts.register_forward_pre_hook(
                lambda _, arguments, settings: inputs.append(given(arguments, settings)),
                with_kwargs=True,
            )
            try:
                for number, call in enumerate(self.calls):
                    missing = call.tokens(goals[number]) - call.tokens(self._output(block, call))
                    real = (x if call.real is None else x[call.real] for x in inputs.pop())
                    hidden, chosen, weights = real
                    one = Seen((hidden, chosen, weights), missing)
                    seen[number % HELD_OUT == 1].append(one)
            finally:
                handle.remove()
            changed = fit_experts_(experts, *seen)
        if changed:
            self._known = []
        return changed

    def _passes(self, block: str, layer: nn.Module) -> bool:
        """Whether the block's output moves as the layer's does, which is found by trying."""
        call = self.calls[0]
        before = self._output(block, call).float()
        step = 1e-2 * before.std()
        handle = layer.register_forward_hook(lambda _, inputs, y: y + step.to(y.dtype))
        try:
            moved = self._output(block, call).float() - before
        finally:
            handle.remove()
        return bool((call.tokens(moved) - step).abs().mean() < 0.05 * step)
