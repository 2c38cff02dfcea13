"""SOS-LoRA (arXiv 2607.16252): experts in orthogonal subspaces, each with a scale of its own,
always on."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from elastic.adapters.base import Adapter
from elastic.config import AdapterConfig


class SosLora(Adapter):
    """ΔW = Σ_k g_k diag(c_k) B_k A_k over K experts, g = K · softmax(gate_logits / T).

    A smaller rank keeps the first ranks of every expert, gates and scales unchanged (`elastic:
    rank`), or the first experts, the softmax still over all (`elastic: experts`; these then stand
    in descending scale).

    Shapes: A (K, expert rank, in_features), B (K, out_features, expert rank),
    expert_scales c (K, out_features), gate_logits (K,).
    """

    along_in: ClassVar = {"A": 2}
    along_out: ClassVar = {"B": 1, "expert_scales": 1}
    temperature: Tensor

    def __init__(
        self, config: AdapterConfig, out_features: int, in_features: int, **factory: Any
    ) -> None:
        super().__init__(config, out_features, in_features)
        self.settings = settings = config.soslora
        self.scale = 1.0  # every expert has scales of its own
        experts, rank = settings.experts, _expert_rank(config)
        self.expert_rank = rank
        self.dropout_on_rank = settings.dropout_on == "rank"
        self.penalty_weight = settings.lambda_orth
        self.base_scales = _scales(config)
        trained = not settings.fixed_scales
        self.A = nn.Parameter(torch.zeros(experts, rank, in_features, **factory))
        self.B = nn.Parameter(torch.zeros(experts, out_features, rank, **factory))
        self.expert_scales = nn.Parameter(
            torch.zeros(experts, out_features, **factory), requires_grad=trained
        )
        self.gate_logits = nn.Parameter(torch.zeros(experts, **factory), requires_grad=trained)
        # Saved with the factors: merging wants the temperature that training ended with.
        self.register_buffer("temperature", torch.tensor(settings.gate_end, **factory))

    @classmethod
    def refuse_rank(cls, config: AdapterConfig, rank: int) -> str | None:
        kept = _expert_rank(config)
        if config.soslora.elastic == "experts":
            kept = config.soslora.experts
        unit = config.rank // math.gcd(config.rank, kept)
        if rank % unit == 0:
            return None
        return f"rank {rank} is no multiple of {unit}, so it would leave the experts uneven"

    @torch.no_grad()
    def start(self, weight: Tensor, generator: torch.Generator) -> None:
        experts, rank, in_features = self.A.shape
        # All rows together, or where the layer is too narrow for that each expert's.
        rows, times = (experts * rank, 1) if experts * rank <= in_features else (rank, experts)
        dtype = self.A.dtype
        blocks = [_orthonormal(rows, in_features, generator, dtype) for _ in range(times)]
        self.A.copy_(math.sqrt(2) * torch.cat(blocks).unflatten(0, (experts, rank)))
        nn.init.zeros_(self.B)
        self.expert_scales.copy_(self._base_scales().expand_as(self.expert_scales))
        logits = 0.05 * torch.randn(experts, generator=generator, dtype=self.A.dtype)
        self.gate_logits.copy_(logits - logits.mean())
        self.temperature.fill_(self.settings.gate_start)

    def gates(self) -> Tensor:
        """(K,), mean 1; in float32 inside, as published."""
        logits = self.gate_logits.float() / self.temperature.float()
        return (len(logits) * torch.softmax(logits, 0)).to(self.gate_logits.dtype)

    def unscaled(self, rank: int) -> tuple[Tensor, Tensor]:
        experts, ranks = self._kept(rank)
        scales = (self.gates()[:, None] * self.expert_scales)[:experts, :, None]
        A, B = self.A[:experts, :ranks], scales * self.B[:experts, :, :ranks]
        if self.settings.elastic == "experts":
            return A.flatten(0, 1), B.transpose(0, 1).flatten(1, 2)
        # Rank 1 of all experts, then rank 2 of all: so smaller ranks lead.
        return A.transpose(0, 1).flatten(0, 1), B.permute(1, 2, 0).flatten(1, 2)

    def penalty(self, rank: int) -> Tensor | None:
        """Squared cosines between active rows of different experts, mean over their pairs, times
        the scheduled weight; a pull of the gates to uniform and of the scales to where they began.
        """
        settings, terms = self.settings, []
        experts, ranks = self._kept(rank)
        if self.penalty_weight and experts > 1:
            terms.append(self.penalty_weight * cross_expert(self.A[:experts, :ranks]))
        if settings.gate_prior and not settings.fixed_scales:
            p = torch.log_softmax(self.gate_logits / self.temperature, 0)
            terms.append(-settings.gate_prior * p.mean())  # KL(uniform, p) up to a constant
        if settings.scale_anchor and not settings.fixed_scales:
            away = self.expert_scales - self._base_scales()
            terms.append(settings.scale_anchor / 2 * away.pow(2).sum())
        return torch.stack(terms).sum() if terms else None

    def advance(self, step: int, steps: int) -> None:
        """The penalty waits, then ramps up; the temperature falls linearly, then stays."""
        settings = self.settings
        delay, ramp = int(settings.orth_delay * steps), int(settings.orth_ramp * steps)
        risen = 1.0 if ramp <= 0 else min(1.0, (step - delay) / ramp)
        self.penalty_weight = settings.lambda_orth * risen if step >= delay else 0.0
        anneal = int(settings.gate_anneal * steps)
        fallen = 1.0 if anneal <= 0 else min(1.0, step / anneal)
        drop = settings.gate_end - settings.gate_start
        self.temperature.fill_(settings.gate_start + fallen * drop)

    def _base_scales(self) -> Tensor:
        return self.expert_scales.new_tensor(self.base_scales)[:, None]

    def _kept(self, rank: int) -> tuple[int, int]:
        """How many experts, and how many ranks of each."""
        experts = len(self.A)
        if self.settings.elastic == "experts":
            return experts * rank // self.max_rank, self.expert_rank
        return experts, self.expert_rank * rank // self.max_rank


def cross_expert(A: Tensor) -> Tensor:
    """Σ cos² over ordered pairs of rows from different experts of A (K, r, in), divided by
    K (K - 1) r²."""
    experts, rank, _ = A.shape
    rows = nn.functional.normalize(A.flatten(0, 1), dim=1, eps=1e-6)
    cosines = (rows @ rows.T).unflatten(0, (experts, rank)).unflatten(2, (experts, rank))
    within = torch.eye(experts, dtype=A.dtype, device=A.device)[:, None, :, None]
    return (cosines**2 * (1 - within)).sum() / max(1, experts * (experts - 1) * rank**2)


def _expert_rank(config: AdapterConfig) -> int:
    shared = config.soslora.rank_mode == "total"
    return config.rank // config.soslora.experts if shared else config.rank


def _scales(config: AdapterConfig) -> list[float]:
    """gamma_k · alpha / rank, gamma from 1 to gamma_max, its mean 1 if normalised."""
    settings = config.soslora
    experts, rank = settings.experts, _expert_rank(config)
    span = (settings.gamma_max - 1) / max(1, experts - 1)
    gammas = [1 + span * k for k in range(experts)]
    if settings.elastic == "experts":
        gammas.reverse()
    normalize = settings.normalize_scales
    if normalize if normalize is not None else settings.rank_mode == "total":
        mean = sum(gammas) / experts
        gammas = [gamma / mean for gamma in gammas]
    base = config.resolved_alpha / (rank * (experts if settings.scale_base == "total" else 1))
    return [gamma * base for gamma in gammas]


def _orthonormal(rows: int, columns: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """(rows, columns): orthonormal rows, or columns when there are more rows than columns."""
    tall = torch.randn(max(rows, columns), min(rows, columns), generator=generator, dtype=dtype)
    Q = torch.linalg.qr(tall).Q
    return Q.T if rows <= columns else Q
