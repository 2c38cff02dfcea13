"""Settings of what is trained on once its size is chosen."""

from __future__ import annotations

from dataclasses import dataclass

from elastic.errors import require


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """A sub-adapter is trained on at its own small size, taught by the maximal one. The maximal one
    gets as many steps, for comparison."""

    steps: int = 0
    """Steps for each sub-adapter; 0: none. `--recover STEPS` says the same."""
    distill: float = 0.5
    """How much of the loss is the divergence from the maximal sub-adapter's answer distribution
    instead of the labels."""
    base_lr: float | None = None
    """Learning rate at the start, from which a cosine goes down to zero; unset is half of the
    run's."""

    def __post_init__(self) -> None:
        require(self.steps >= 0, f"recover.steps is {self.steps}; at least 0")
        require(0 <= self.distill <= 1, f"recover.distill is {self.distill}; choose from [0, 1]")
        rate = self.base_lr
        require(rate is None or rate > 0, f"recover.base_lr is {rate}; it must be positive")
