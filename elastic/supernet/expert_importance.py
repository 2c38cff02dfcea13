"""Which experts of a mixture matter, and which channels of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

from elastic.spaces.mixtures import EXPERT_WIDTH, EXPERTS, Mixture, core
from elastic.supernet.routed import channels, given, outputs, whole

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from elastic.adapters.experts import MixtureLayers
    from elastic.spaces.bound import Group
    from elastic.supernet.supernet import Supernet


class Routed:
    """Adds up what calibration tokens say of the experts that some groups cut."""

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.model = model
        self._added: dict[str, Tensor] = {}
        """(experts,) by module of experts: norms of what each adds."""
        self._squares: dict[str, Tensor] = {}
        """(experts, channels): squares of what their channels hold."""
        self.tell: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {}
        """By module of experts, what its inputs are told to (`elastic.supernet.routed.told`)."""
        for group in groups:
            for mixture in group.mixtures:
                name, number = mixture.experts, mixture.all_experts
                self.tell[name] = partial(self._add, name)
                if group.dim == EXPERTS:
                    self._added[name] = torch.zeros(number, dtype=torch.float64)
                else:
                    self._squares[name] = torch.zeros(number, mixture.width, dtype=torch.float64)

    def _add(self, name: str, hidden: Tensor, chosen: Tensor, weights: Tensor) -> None:
        experts = self.model.get_submodule(name)
        if name in self._added:
            for sent, added in outputs(experts, hidden, chosen, weights):
                norms = added.double().norm(dim=1).cpu()
                self._added[name].index_add_(0, sent.cpu(), norms)
        if name in self._squares:
            for sent, held in channels(experts, hidden, chosen, weights):
                self._squares[name].index_add_(0, sent.cpu(), held.double().square().cpu())

    def scores(self, mixture: Mixture, group: Group) -> Tensor:
        """What these tokens say of the units of a group."""
        if group.dim == EXPERTS:
            return _by_group(self._added[mixture.experts], mixture)
        experts: Any = core(self.model.get_submodule(mixture.experts))
        out = 2 if experts.is_transposed else 1
        return self._squares[mixture.experts] * experts.down_proj.double().square().sum(out).cpu()


def expert_norms(model: nn.Module, mixture: Mixture, group: Group) -> Tensor:
    """Summed absolute values of all tensors of an expert, or of those that make a channel."""
    experts: Any = core(model.get_submodule(mixture.experts))
    tensors = dict(experts.named_parameters(recurse=False))
    if group.dim == EXPERTS:
        sums = (tensor.double().abs().flatten(1).sum(1) for tensor in tensors.values())
        return _by_group(sum(sums, torch.zeros(())).cpu(), mixture)
    total = torch.zeros(mixture.all_experts, mixture.width, dtype=torch.float64)
    for axis in mixture.axes:
        if axis.of == "channels" and axis.tensor != "down_proj":
            size = tensors[axis.tensor].double().abs()
            size = size.sum(3 - axis.number) if size.dim() == 3 else size
            # One part behind another, or side by side in one.
            parts = size.cpu().split([mixture.width * part for part in axis.parts], 1)
            total += sum(part.unflatten(1, (mixture.width, -1)).sum(2) for part in parts)
    return total


def _by_group(scores: Tensor, mixture: Mixture) -> Tensor:
    """Of the experts in every group of a router that chooses groups first."""
    return scores.view(mixture.groups, -1) if mixture.groups > 1 else scores


def experts_watched(
    net: Supernet, group: Group, tell: Callable[[Tensor], None], starts: Sequence[Tensor]
) -> Iterator[RemovableHandle]:
    """Hooks that tell the products (examples, tokens, hidden) of gradients and what would be gone
    of the experts with this group at its smallest choice; the last of `starts` has the batch in
    front."""
    of_ranks = (net.space.experts_of(cut.site) for cut in group.cuts)
    names = dict.fromkeys(m.experts for m in (*group.mixtures, *of_ranks) if m)
    for layers in (net.mixtures[name] for name in names):

        def hook(
            _: nn.Module,
            arguments: tuple[Any, ...],
            settings: dict[str, Any],
            output: Tensor,
            layers: MixtureLayers = layers,
        ) -> None:
            examples = len(starts[-1])
            with torch.no_grad():
                lost = _lost(layers, group, given(arguments, settings))
            output.register_hook(
                lambda gradient: tell((lost * gradient).reshape(examples, -1, lost.shape[-1]))
            )

        yield layers.experts.register_forward_hook(hook, with_kwargs=True)


def _lost(layers: MixtureLayers, group: Group, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """What all experts add, less what is left at the smallest choice, (tokens, hidden)."""
    hidden, chosen, weights = given
    module, mixture, least = layers.experts, layers.mixture, group.choices[-1]
    full = whole(module)
    if group.dim == EXPERTS:  # the last ones of every group are gone
        gone = chosen % mixture.count >= least
        return functional_call(module.base, full, (hidden, chosen, weights * gone))
    if group.dim == EXPERT_WIDTH:
        small = module.at(replace(module.full, channels=least))
    else:
        sites = {cut.site for cut in group.cuts}
        ranks = {name: least for name in module.factors if f"{mixture.experts}.{name}" in sites}
        small = module.at(module.full, ranks)
    all_of_it: Tensor = functional_call(module.base, full, given)
    return all_of_it - functional_call(module.base, small, given)
