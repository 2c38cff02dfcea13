"""What can go wrong, as a tree.

    ElasticError
    ├── ConfigError
    ├── DataError
    │   └── DataMissing
    ├── ModelError
    ├── RunError
    │   ├── BaseMismatch
    │   └── TrainingError
    ├── BudgetError
    ├── ExportError
    └── MissingExtra

Every message says what failed, where, what came and what would work. `BudgetError` ends a command
with exit code 2, the others with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ElasticError(Exception):
    """Base of everything this package raises on purpose."""

    def __str__(self) -> str:
        """On one line, whatever the values that it names hold."""
        return " ".join(super().__str__().splitlines())


class ConfigError(ElasticError, ValueError):
    """A setting, a search space or a stage that cannot work."""


class DataError(ElasticError, ValueError):
    """A data file or split that cannot be used; names file and line."""


class DataMissing(DataError):
    """A data file or folder that is not there."""


class ModelError(ElasticError):
    """A base model that is not there or has no place to attach to."""


class RunError(ElasticError):
    """A run directory that belongs to something else, or lacks a step."""


class BaseMismatch(RunError):
    """A super-adapter met another base model than its own."""


class TrainingError(RunError):
    """The loss or a factor became infinite or NaN."""


class BudgetError(ElasticError):
    """No sub-adapter meets the budget."""


class ExportError(ElasticError):
    """A model that cannot be written as asked, or was not written right."""


class MissingExtra(ElasticError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, what: str) -> None:
        super().__init__(
            f"{what} needs {package}, which is not installed; "
            f"pip install 'elastic-adapters[{extra}]'"
        )


def require(condition: bool, message: str) -> None:
    """ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name outside `known`, with the nearest one suggested."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    shown = known if len(known) <= 12 else [*known[:12], "..."]
    return f"unknown {kind} {name!r};{hint} known: {', '.join(shown)}"
