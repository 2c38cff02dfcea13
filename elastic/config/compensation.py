"""Settings of what is done about the channels that a sub-adapter cuts."""

from __future__ import annotations

from dataclasses import dataclass, field

from elastic.errors import require


@dataclass(frozen=True, kw_only=True)
class CompensationConfig:
    """A sub-adapter makes up for channels that it cuts: what kept ones say of them is folded into
    their weights, at no cost when the model runs. How much is decided on examples held out."""

    degrees: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0])
    """Parts of what is lost to make up for; each sub-adapter gets the one with which it answers
    validation examples most like the full model. One value is taken unasked; 0 alone makes up for
    nothing."""
    sequential: bool = True
    """Fit finalists of a search, and what is exported, to the full model block after block, too,
    where they then answer more like it."""
    every_trial: bool = False
    """Fit every trial of a search so, too: worth it where evaluating takes longer than fitting."""
    fitted_examples: int = 64
    """Training examples that this sees."""
    examples: int = 64
    """Validation examples that decide; test examples never do."""
    ridge: float = 0.01
    """Damping of the least squares, in parts of the mean square of a channel."""
    room_mb: int = 1000
    """Memory for solutions, which are otherwise solved again whenever they are needed, and as much
    for the full model's answers to `examples`, of which the first that fit are asked."""

    def __post_init__(self) -> None:
        require(bool(self.degrees), "compensation.degrees is empty; 0 alone makes up for nothing")
        for degree in self.degrees:
            require(0 <= degree <= 1, f"compensation.degrees has {degree}; choose from [0, 1]")
        for name in ("examples", "fitted_examples"):
            value = getattr(self, name)
            require(value >= 1, f"compensation.{name} is {value}; at least 1")
        require(
            self.sequential or not self.every_trial,
            "compensation.every_trial: nothing is fitted with compensation.sequential false",
        )
        require(self.ridge > 0, f"compensation.ridge is {self.ridge}; it must be positive")
        require(self.room_mb >= 0, f"compensation.room_mb is {self.room_mb}; at least 0")

    @property
    def is_on(self) -> bool:
        """Whether anything may be made up for."""
        return any(self.degrees)
