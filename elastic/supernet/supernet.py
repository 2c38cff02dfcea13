"""A model with one active sub-adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elastic.adapters import METHODS, ROUTED, Adapter, check
from elastic.adapters.experts import ElasticExperts, MixtureLayers
from elastic.adapters.layers import ElasticLinear, reorder_linear
from elastic.config import AdapterConfig
from elastic.console import say, track
from elastic.errors import RunError
from elastic.models.head import widen_head_
from elastic.models.wrappers import text_config
from elastic.spaces.bound import BoundSpace, SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.spaces.dims import channel_index
from elastic.spaces.mixtures import EXPERT_WIDTH, EXPERTS
from elastic.spaces.targets import sizes_of
from elastic.supernet.compensation import Compensation
from elastic.supernet.depth import Stack
from elastic.supernet.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


OF = {EXPERTS: "experts", EXPERT_WIDTH: "channels"}
"""What a dimension of mixtures keeps some of."""


class Supernet:
    """A base model whose target layers, and blocks, run at the sizes of one active sub-adapter.

    The base weights are permuted in place so that the important channels come first (quantised
    ones keep their codes and remember the order); nothing else of them changes, and the function
    at full size stays the same. `model` is the transformers model to call; it starts with the
    maximal sub-adapter active. Without `start` the factors are left at zero, to be loaded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        space: SearchSpace,
        adapter: AdapterConfig,
        *,
        order: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        start: bool = True,
        is_ordered: bool = False,
    ) -> None:
        """`start`: with factors to train, else with room for them. `is_ordered`: the channels of
        the model stand in that order already."""
        self.model = model.requires_grad_(False)
        self.declared = space
        self.adapter = adapter
        self.space: BoundSpace = space.bind(model, adapter.rank)
        check(adapter, model, self.space)
        # What is trained stays float32 under a base in half precision, whose rounding would swallow
        # its updates.
        self.head = widen_head_(model, torch.promote_types(model.dtype, torch.float32))
        generator = torch.Generator().manual_seed(seed) if start else None
        self._attach(generator)
        cut = [mixture for mixture, _ in self.space.mixtures.values()]
        self.mixtures = {
            mixture.experts: MixtureLayers(model, mixture)
            for mixture in {each.experts: each for each in (*cut, *self.space.adapted)}.values()
        }
        """Those that are cut or carry factors, by the name of their module of experts."""
        self._adapt_experts(generator)
        config = text_config(model.config)
        if cut and getattr(config, "output_router_logits", False):
            say("The loss that balances experts is off: it counts on as many in every layer")
            config.output_router_logits = False
        # A head that gets the last positions of every sequence gets a view with gaps, and would be
        # multiplied, its whole weight read, once per sequence instead of once.
        if head := model.get_output_embeddings():
            head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        self.order: dict[str, Tensor] = {}
        self.vocabulary = Vocabulary(model, group) if (group := self.space.vocabulary) else None
        """Which tokens the head knows; None where it knows all of them at every size."""
        if order is not None:
            self.reorder(order, is_ordered=is_ordered)
        depths = {group.name: group.blocks[0].rpartition(".")[0] for group in self.space.depths}
        stacks = {name: Stack(model, name) for name in depths.values()}
        self._stacks = {group: (name, stacks[name]) for group, name in depths.items()}
        self.current = self.space.maximal()
        self.degree = 0.0
        """How much of what is cut is made up for now."""
        self.compensation: Compensation | None = None
        self._actions = {
            group.name: [
                (self.layer(cut.site).size, cut, self.space.is_leading(cut)) for cut in group.cuts
            ]
            for group in self.space
        }
        self._counted = {
            group.name: [(model.get_submodule(name), what) for name, what in group.counted]
            for group in self.space
        }
        self._mixtures = {
            group.name: [self.mixtures[mixture.experts] for mixture in group.mixtures]
            for group in self.space
        }
        self._dims = {group.name: group.dim for group in self.space}

    @property
    def device(self) -> torch.device:
        """Where factors are, and solutions: the model's, or the CPU for one without data (meta)."""
        device = self.model.device
        return torch.device("cpu") if device.type == "meta" else device

    def layer(self, site: str) -> ElasticLinear:
        """The layer with factors at this place in the model, or what stands for a matrix of all
        experts there (`ExpertFactors`)."""
        return self.model.get_submodule(site)

    def adapters(self) -> Iterator[tuple[str, Adapter]]:
        """Site and factors of every adapted layer."""
        for site in self.space.targets:
            if (adapter := self.layer(site).adapter) is not None:
                yield site, adapter

    def _attach(self, generator: torch.Generator | None) -> None:
        cut_sites = (c.site for group in self.space for c in group.cuts if c.axis != "rank")
        targets = set(self.space.targets)
        name = self.adapter.resolved_method
        method = METHODS[name]
        # Factors of a base without data (meta) can still be loaded.
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        linear = (site for site in self.space.targets if not self.space.experts_of(site))
        sites = list(dict.fromkeys((*linear, *cut_sites)))
        for site in track(sites, f"attaching {name}", quiet=generator is None):
            base = self.model.get_submodule(site)
            adapter = None
            if site in targets:
                sizes = base.out_features, base.in_features
                adapter = method(self.adapter, *sizes, dtype=dtype, device=self.device)
                if generator is not None:
                    adapter.start(base.weight, generator)
            self.model.set_submodule(site, ElasticLinear(base, adapter, self.adapter.dropout))

    def _adapt_experts(self, generator: torch.Generator | None) -> None:
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        for site in self.space.targets:
            if mixture := self.space.experts_of(site):
                leaf = site.rpartition(".")[2]
                method = ROUTED[self.adapter.resolved_method]
                sizes = sizes_of(mixture, leaf)
                adapter = method(self.adapter, *sizes, dtype=dtype, device=self.device)
                layers = self.mixtures[mixture.experts]
                if generator is not None:
                    adapter.start(layers.experts.tensors()[leaf], generator)
                layers.adapt(leaf, adapter)

    def reorder(self, order: Mapping[str, Tensor], *, is_ordered: bool = False) -> None:
        """Permute the channels of every group in `order`, once; RunError the second time. The
        model's own stay where they are if it `is_ordered` already."""
        if self.order:
            raise RunError("the channels of this supernet have been ordered already")
        self.order = dict(order)
        for (site, axis), index in self.permutations().items():
            layer = self.layer(site)
            if not is_ordered:
                reorder_linear(layer.base, axis, index)
            if layer.adapter is not None:
                layer.adapter.reorder(axis, index)
        for name, mixture in self.mixtures.items():
            orders = self.expert_orders(name)
            if not is_ordered:
                mixture.reorder(*orders)
            mixture.reorder_factors(*orders)
        if self.vocabulary and self.vocabulary.group.name in order:
            self.vocabulary.order = order[self.vocabulary.group.name].cpu()
        self.space = self.space.ordered(order)

    def permutations(self) -> dict[tuple[str, str], Tensor]:
        """Per cut layer and axis ("out" or "in"), which channel of the base model stands at each
        place; the inverse (argsort) leads back."""
        found: dict[tuple[str, str], Tensor] = {}
        for place, cuts in self.space.axes.items():
            # What stands in the parts of an axis is ordered before they are.
            for group, cut in sorted(cuts, key=lambda each: not each[1].apart):
                if group.name in self.order:
                    index = channel_index(self.order[group.name], cut)
                    found[place] = found[place][index] if place in found else index
        return found

    def expert_orders(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Of the module of experts of this name: the order of its experts, (experts,) or (groups,
        experts of one), and of the channels of each, (all experts, channels), as the base model has
        its experts; None: as they stand."""
        groups = self.space.mixtures[name][1] if name in self.space.mixtures else {}
        orders = (self.order.get(groups[dim].name) if dim in groups else None for dim in OF)
        experts, channels = orders
        return experts, channels

    def in_mixture(self, name: str) -> tuple[str, ElasticExperts, str] | None:
        """Of a tensor that has something for every expert: the name of their module, the module
        that holds it, and its name there; None for any other."""
        for experts, mixture in self.mixtures.items():
            for site, module in mixture.modules.items():
                leaf = name.removeprefix(f"{site}.")
                if leaf != name and leaf in module.tensors():
                    return experts, module, leaf
        return None

    def activate(self, sub: SubAdapter, degree: float = 0.0) -> None:
        """Make `sub` the active sub-adapter; only groups that differ are touched. A part `degree`
        of what is cut is made up for (`elastic.supernet.compensation`), if its moments are known.
        RunError if `sub` is no point of the space.

        Prefer `active`, which restores what was there.
        """
        if [name for name, _ in sub.choices] != [name for name, _ in self.current.choices]:
            raise RunError(
                "sub-adapter: its groups are not those of this supernet, in their order; "
                "`space.check` sorts them or names the strange ones"
            )
        stacks: dict[str, Stack] = {}
        for (name, choice), (_, old) in zip(sub.choices, self.current.choices, strict=True):
            if choice in (old, 0):  # 0: its block does not run
                continue
            if name in self._stacks:
                stacks |= [self._stacks[name]]
            if self.vocabulary and name == self.vocabulary.group.name:
                self.vocabulary.run(choice)
            for size, cut, leading in self._actions[name]:
                if cut.axis == "rank":
                    size.rank = choice
                elif not leading:
                    size.keep(cut.axis, self.space.left(sub, cut.site, cut.axis))
                elif cut.axis == "in":
                    size.columns = choice * cut.unit
                else:
                    size.rows = choice * cut.unit
            for module, attribute in self._counted[name]:
                setattr(module, attribute, choice)
            for mixture in self._mixtures[name]:
                mixture.keep(OF[self._dims[name]], choice)
        kept = self.space.kept(sub) if stacks else {}
        for name, stack in stacks.items():
            stack.run(kept[name])
        self.current = sub
        if degree or self.degree:
            self._make_up(degree)

    def cuts(self, sub: SubAdapter) -> bool:
        """Whether some layer that runs has fewer columns than in full, or some expert fewer
        channels."""
        return any(
            0 < sub[group.name] < group.choices[0]
            and (group.dim == EXPERT_WIDTH or any(cut.axis == "in" for cut in group.cuts))
            for group in self.space
        )

    def drops_experts(self, sub: SubAdapter) -> bool:
        """Whether some mixture that runs has fewer experts than in full."""
        return any(
            group.dim == EXPERTS and 0 < sub[group.name] < group.choices[0] for group in self.space
        )

    def cut_vocabulary_(self, compact: PreTrainedModel, sub: SubAdapter) -> PreTrainedModel:
        """A compact model that computes all tokens with those of `sub` alone, in place."""
        if self.vocabulary is None:
            return compact
        return self.vocabulary.cut_(compact, sub[self.vocabulary.group.name])

    def _make_up(self, degree: float) -> None:
        """Let the layers whose columns are cut make up for so much of it."""
        self.degree = degree
        gone = self.space.left_out(self.current)
        for site in self.space.reading:
            layer = self.layer(site)
            cut = layer.size.columns < layer.base.in_features and not site.startswith(gone)
            layer.size.made_up, layer.size.degree = None, degree
            if degree and cut and self.compensation is not None:
                left = self.space.left(self.current, site, "in")
                layer.size.made_up = self.compensation(site, left)
        for name, mixture in self.mixtures.items():
            channels = mixture.experts.size.channels
            cut = channels < mixture.mixture.width and not name.startswith(gone)
            solution = None
            if degree and cut and self.compensation is not None:
                solution = partial(self._of_expert, name, channels)
            mixture.make_up(solution, degree)

    def _of_expert(self, name: str, channels: int, place: int) -> Tensor | None:
        assert self.compensation is not None
        return self.compensation(f"{name}.{place}", ((0, channels),))

    @contextlib.contextmanager
    def active(self, sub: SubAdapter, degree: float = 0.0) -> Iterator[PreTrainedModel]:
        """The model with `sub` active, and so much made up for, inside the block."""
        before = self.current, self.degree
        self.activate(sub, degree)
        try:
            yield self.model
        finally:
            self.activate(*before)

    def factor_state(self) -> dict[str, Tensor]:
        """All factors at full size, by site, and the head of a classifier: what training
        changes."""
        factors = {
            f"{site}.{name}": tensor.detach().contiguous()
            for site, adapter in self.adapters()
            for name, tensor in adapter.state_dict().items()
        }
        return factors | {name: head.detach() for name, head in self.head.items()}

    def named(self, model_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same in a state of the whole model, named as `factor_state` names them."""
        factors = {
            f"{site}.{name}": model_state[f"{site}.adapter.{name}"]
            for site, adapter in self.adapters()
            for name in adapter.state_dict()
            if f"{site}.adapter.{name}" in model_state
        }
        return factors | {name: model_state[name] for name in self.head if name in model_state}

    @torch.no_grad()
    def load_factors(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `factor_state`; RunError when names or shapes differ, or a value is NaN."""
        verified = self._verified(state)
        for name, own in self.head.items():
            if name not in state or state[name].shape != own.shape:
                found = tuple(state[name].shape) if name in state else "missing"
                raise RunError(f"{name} of the head: expected {tuple(own.shape)}, it is {found}")
            if not torch.isfinite(state[name]).all():
                raise RunError(f"{name} of the head holds NaN or infinite values")
        for name, own in self.head.items():
            own.copy_(state[name])
        for adapter, part in verified:
            adapter.load(part)

    def load_updates(self, state: Mapping[str, Tensor]) -> None:
        """The factors of `state` alone, whatever head they were trained with."""
        sites = set(self.space.targets)
        own = {name: t for name, t in state.items() if name.rpartition(".")[0] in sites}
        for adapter, part in self._verified(own):
            adapter.load(part)

    def succeed(self, state: Mapping[str, Tensor], seed: int = 0) -> None:
        """Begin the next task of a sequence after the one that ended with `state`."""
        generator = torch.Generator().manual_seed(seed)
        for adapter, own in self._verified(state):
            adapter.succeed(own, generator)

    def _verified(self, state: Mapping[str, Tensor]) -> list[tuple[Adapter, dict[str, Tensor]]]:
        """Every adapter with its part of `state`; nothing has been changed when this raises."""
        parts: dict[str, dict[str, Tensor]] = {site: {} for site in self.space.targets}
        for name, tensor in state.items():
            site, _, own = name.rpartition(".")
            if name in self.head:
                continue
            if site not in parts:
                raise RunError(f"factors: {name} belongs to no layer that this space adapts")
            parts[site][own] = tensor
        for site, adapter in self.adapters():
            adapter.verify(parts[site], site)
        return [(adapter, parts[site]) for site, adapter in self.adapters()]

    def penalty(self, learning_rate: float) -> Tensor | None:
        """The regulariser of the active sub-adapter; None if the method has none now."""
        left_out = self.space.left_out(self.current)
        sites = (site for site in self.space.targets if not site.startswith(left_out))
        layers = ((layer, layer.adapter) for layer in map(self.layer, sites))
        found = [adapter.penalty(layer.size.rank) for layer, adapter in layers if adapter]
        terms = [term for term in found if term is not None]
        return METHODS[self.adapter.resolved_method].total(terms, learning_rate) if terms else None

    def advance(self, step: int, steps: int) -> None:
        """Set what follows a schedule; `step` counts finished optimiser steps of `steps`."""
        for _, adapter in self.adapters():
            adapter.advance(step, steps)
