"""Settings of `elastic space`."""

from __future__ import annotations

from dataclasses import dataclass, field

from elastic.config.model import ModelConfig
from elastic.errors import require


@dataclass(frozen=True, kw_only=True)
class SpaceShowConfig:
    """Prints what a search space cuts of a model, and how many sub-adapters it has."""

    space: str = "auto"
    """A shipped search space, a YAML file, auto or auto-deep."""
    model: ModelConfig = field(default_factory=ModelConfig)
    rank: int = 32
    """The full rank of the factors."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"rank is {self.rank}; give 1 or more")


@dataclass(frozen=True, kw_only=True)
class SpaceImportConfig:
    """Reads a space, its stages and its search as LoNAS and Shears published them for NNCF."""

    file: str = "nncf_config.json"
    """The JSON file."""
    save: str | None = None
    """The space's YAML file to write; training and search settings stand beside it. Unset: the name
    of `file`, here."""
    adapt: list[str] = field(default_factory=list)
    """Further layers of a block that carry factors, of full rank: mlp.down_proj."""
