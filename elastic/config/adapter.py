"""Settings of the adapter methods; like those of the commands, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from elastic.config.numbers import require_numbers
from elastic.errors import require


@dataclass(frozen=True, kw_only=True)
class SorsaConfig:
    """SORSA (arXiv 2409.00055): trains the leading singular triplets of every base weight."""

    gamma: float = 4e-4
    """Strength of the orthonormality regulariser: a learning rate of its own, following the
    schedule. Applied whole once per step; the published code divided it by the accumulation."""
    regulariser: Literal["norm", "squared"] = "norm"
    """norm: Frobenius norms as published. squared: their squares, which fade near orthonormality;
    gamma then means something else."""
    svd: Literal["exact", "randomized"] = "exact"
    """randomized: approximate triplets, much faster for layers of thousands of channels."""

    def __post_init__(self) -> None:
        require(self.gamma >= 0, f"adapter.sorsa.gamma is {self.gamma}; at least 0")


@dataclass(frozen=True, kw_only=True)
class ProloraConfig:
    """PRoLoRA (arXiv 2402.16902): chunks of factors repeated and rotated. Its ablations: without
    rotation (`rotation false`), without unshared ranks (`unshared_rank 0`), plain start
    (`rectified false`), broadcast only (the first two together)."""

    unshared_rank: int = 1
    """Ranks with factors of their own; the smallest rank a sub-adapter can have."""
    share_in: int = 4
    """How often a chunk of A is repeated along the input channels (m)."""
    share_out: int = 4
    """How often a chunk of B is repeated along the output channels (n)."""
    rotation: bool = True
    """Rotate every repetition along the ranks."""
    rectified: bool = True
    """Start chunks with the variance of the layer's size instead of the chunk's."""

    def __post_init__(self) -> None:
        least = {"unshared_rank": 0, "share_in": 1, "share_out": 1}
        for name, low in least.items():
            value = getattr(self, name)
            require(value >= low, f"adapter.prolora.{name} is {value}; at least {low}")


@dataclass(frozen=True, kw_only=True)
class OloraConfig:
    """O-LoRA (arXiv 2310.14152): factors of finished tasks frozen, new ones orthogonal to them."""

    lambda_1: float = 0.5
    """Weight of the overlap between new and finished A."""
    lambda_2: float = 0.0
    """Weight of the norms of the new factors."""
    orthogonality: Literal["absolute", "squared"] = "absolute"
    """absolute: as the published code and its lambda_1. squared: as the paper prints it."""
    shrink: Literal["newest", "all"] = "newest"
    """Which factors a smaller rank cuts: the task in training, or every task alike."""

    def __post_init__(self) -> None:
        for name in ("lambda_1", "lambda_2"):
            value = getattr(self, name)
            require(value >= 0, f"adapter.olora.{name} is {value}; at least 0")


@dataclass(frozen=True, kw_only=True)
class SosLoraConfig:
    """SOS-LoRA (arXiv 2607.16252): experts in orthogonal subspaces at several scales, all on."""

    experts: int = 4
    """How many experts a layer has."""
    rank_mode: Literal["total", "expert"] = "total"
    """Whether adapter.rank is shared by the experts or belongs to each."""
    elastic: Literal["rank", "experts"] = "rank"
    """What a smaller rank cuts: ranks of every expert, or whole experts."""
    gamma_max: float = 2.5
    """Scales start evenly between 1 and this, times alpha / rank."""
    normalize_scales: bool | None = None
    """Divide the starting scales by their mean; unset does so for `rank_mode: total`."""
    scale_base: Literal["expert", "total"] = "expert"
    """Which rank alpha is divided by."""
    fixed_scales: bool = False
    """Freeze scales and gates, as the paper's title says; its code trains them."""
    lambda_orth: float = 0.006
    """Weight of the penalty on rows of different experts, after delay and ramp."""
    orth_delay: float = 0.15
    """Fraction of training before the penalty begins."""
    orth_ramp: float = 0.20
    """Fraction of training over which it then rises."""
    gate_start: float = 2.0
    """Temperature of the gate at the start."""
    gate_end: float = 1.0
    """Temperature of the gate at the end."""
    gate_anneal: float = 0.30
    """Fraction of training over which the temperature goes from start to end."""
    gate_prior: float = 2e-4
    """Pull of the gates to uniform."""
    scale_anchor: float = 1e-4
    """Pull of the scales to where they began."""
    dropout_on: Literal["rank", "input"] = "rank"
    """Whether dropout acts on A x, as published, or on x."""

    def __post_init__(self) -> None:
        require(self.experts >= 1, f"adapter.soslora.experts is {self.experts}; at least 1")
        for name in ("gamma_max", "gate_start", "gate_end"):
            value = getattr(self, name)
            require(value > 0, f"adapter.soslora.{name} is {value}; above 0")
        for name in ("lambda_orth", "gate_prior", "scale_anchor"):
            value = getattr(self, name)
            require(value >= 0, f"adapter.soslora.{name} is {value}; at least 0")
        for name in ("orth_delay", "orth_ramp", "gate_anneal"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"adapter.soslora.{name} is {value}; choose from [0, 1]")


Method = Literal["lora", "sorsa", "prolora", "olora", "soslora"]
_ALPHA_PER_RANK: dict[Method, float] = {
    "lora": 2.0, "sorsa": 1.0, "prolora": 2.0, "olora": 4.0, "soslora": 1.0
}  # fmt: skip


NOTHING = "none"
"""An adapter that changes nothing."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The low-rank factors of the super-adapter."""

    taken_from: str | None = None
    """A LoRA of PEFT to take over instead of training one, as its folder, or none: the base model
    as it is. Its ranks are sorted by what they do; rank and alpha are its own. On the command line
    `--adapter.from` says the same."""

    method: Literal["auto", Method] = "auto"
    """auto: lora, or olora when there is a list of tasks."""
    rank: int = 32
    """Inner size of the maximal sub-adapter's factors (max_rank)."""
    alpha: float | None = None
    """The scale of the update is alpha / rank at every active rank. Unset, the scale is the
    method's published one: lora 2, sorsa 1, prolora 2, olora 4, soslora 1."""
    dropout: float = 0.0
    """Probability with which an input of the adapter is left out in training."""
    lr_ratio: float = 1.0
    """Learning rate of the output-side factors over the others' (LoRA+, arXiv 2402.12354)."""
    sorsa: SorsaConfig = field(default_factory=SorsaConfig)
    prolora: ProloraConfig = field(default_factory=ProloraConfig)
    olora: OloraConfig = field(default_factory=OloraConfig)
    soslora: SosLoraConfig = field(default_factory=SosLoraConfig)

    def __post_init__(self) -> None:
        require_numbers(self, "adapter.")
        require(
            self.taken_from is None or self.resolved_method == "lora",
            f"adapter.from takes over a LoRA; leave out adapter.method ({self.method})",
        )
        require(self.rank >= 1, f"adapter.rank is {self.rank}; it must be at least 1")
        require(0 <= self.dropout < 1, f"adapter.dropout is {self.dropout}; choose from [0, 1)")
        require(
            self.alpha is None or self.alpha > 0,
            f"adapter.alpha is {self.alpha}; it must be positive",
        )
        require(self.lr_ratio > 0, f"adapter.lr_ratio is {self.lr_ratio}; it must be positive")
        unshared, experts = self.prolora.unshared_rank, self.soslora.experts
        require(
            self.resolved_method != "prolora" or unshared <= self.rank,
            f"adapter.prolora.unshared_rank is {unshared}, above adapter.rank {self.rank}",
        )
        total = self.resolved_method == "soslora" and self.soslora.rank_mode == "total"
        require(
            not total or self.rank % experts == 0,
            f"adapter.rank {self.rank} is not divisible by adapter.soslora.experts {experts}; "
            f"choose a multiple, or rank_mode: expert",
        )

    @property
    def resolved_method(self) -> Method:
        """`method`, with auto decided."""
        return "lora" if self.method == "auto" else self.method

    @property
    def resolved_alpha(self) -> float:
        """`alpha`, or the method's published one."""
        if self.alpha is not None:
            return self.alpha
        return _ALPHA_PER_RANK[self.resolved_method] * self.rank

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.resolved_alpha / self.rank
