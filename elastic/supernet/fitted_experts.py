"""Sequential compensation of a mixture: what a block lacks is fitted into the experts it has left.

With h_e(t) what the channels of expert e hold for a token t that is sent to it, times its weight,
and r(t) what the full block's output has over the compact one's, the last matrices of the experts
change by the Δ_e that make Σ_t ‖r(t) - Σ_e Δ_e h_e(t)‖² small: one expert after another, on what
those before have left over, twice. Tokens of experts that are gone are sent to others, which so
learn what the gone ones gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastic.spaces.mixtures import DOWN
from elastic.supernet.least_squares import Sums
from elastic.supernet.routed import channels

ROUNDS = 2


@dataclass
class Seen:
    """Tokens of one batch: what experts get for them, and what the block lacks."""

    given: tuple[Tensor, Tensor, Tensor]
    """Hidden states, experts and weights, (tokens, ...), real ones alone."""
    missing: Tensor
    """(tokens, hidden), float32."""


@torch.no_grad()
def fit_experts_(experts: Any, fitted: Sequence[Seen], held_out: Sequence[Seen]) -> bool:
    """Change the last matrices of a module of experts, in place; whether any changed."""
    if not fitted or not held_out:
        return False
    parts = [_Part(experts, fitted), _Part(experts, held_out)]
    down: Tensor = getattr(experts, DOWN)
    wide = torch.promote_types(down.dtype, torch.float32)
    added: dict[int, Tensor] = {}
    for _ in range(ROUNDS):
        for expert in range(len(down)):
            sums = [part.sums(expert) for part in parts]
            change = sums[0].best(parts[0].width, held_out=sums[1])
            if change is None:
                continue
            for part in parts:
                part.subtract(expert, change)
            added[expert] = added.get(expert, 0) + change
    weight = down.to(wide)
    if added and weight is down:
        weight = down.clone()
    for expert, change in added.items():
        weight[expert] += (change.T if experts.is_transposed else change).to(weight)
    if added:
        setattr(experts, DOWN, nn.Parameter(weight.to(down.dtype), requires_grad=False))
    return bool(added)


class _Part:
    """Of some tokens, what every expert's channels hold."""

    def __init__(self, experts: Any, seen: Sequence[Seen]) -> None:
        self.missing = torch.cat([one.missing for one in seen])
        self._held: dict[int, list[tuple[Tensor, Tensor]]] = {}
        start = 0
        for one in seen:
            for sent, held in channels(experts, *one.given):
                for expert in set(sent.tolist()):
                    tokens = (sent == expert).nonzero()[:, 0]
                    pair = tokens + start, held[tokens].float()
                    self._held.setdefault(expert, []).append(pair)
            start += len(one.missing)
        down = getattr(experts, DOWN)
        self.width = down.shape[1 if experts.is_transposed else 2]

    def sums(self, expert: int) -> Sums:
        """Of the tokens of one expert."""
        sums = Sums()
        for tokens, held in self._held.get(expert, ()):
            sums.add(held, self.missing[tokens])
        return sums

    def subtract(self, expert: int, change: Tensor) -> None:
        """Take what one expert adds by this change from what is missing."""
        for tokens, held in self._held.get(expert, ()):
            self.missing.index_add_(0, tokens, -(held @ change.T.to(held)))
