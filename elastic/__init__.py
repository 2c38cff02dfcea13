"""Train one elastic super-adapter, search it under a latency budget, export a compact model.

    from elastic import ExportConfig, SearchConfig, TrainConfig, export, search, train

    train(TrainConfig(run="runs/mine"))
    search(SearchConfig(run="runs/mine"))
    export(ExportConfig(run="runs/mine"))

Names are resolved when first used, so importing costs nothing.
"""

import importlib
from typing import Any

_WHERE = {
    "TrainConfig": "config",
    "SearchConfig": "config",
    "ExportConfig": "config",
    "EvaluateConfig": "config",
    "LatencyConfig": "config",
    "BudgetConfig": "config",
    "RecoveryConfig": "config",
    "ModelConfig": "config",
    "AdapterConfig": "config",
    "TaskConfig": "config",
    "StageConfig": "config",
    "ElasticError": "errors",
    "SearchSpace": "spaces.declared",
    "SubAdapter": "spaces.bound",
    "Supernet": "supernet.supernet",
    "Run": "run",
    "train": "training.command",
    "search": "recovery.command",
    "export": "recovery.command",
    "load": "serving.load",
    "compact": "supernet.compact",
    "sliced": "supernet.compact",
}

__all__ = list(_WHERE)
__version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _WHERE:
        raise AttributeError(f"module 'elastic' has no attribute {name!r}")
    return getattr(importlib.import_module(f"elastic.{_WHERE[name]}"), name)


def _version() -> str:
    """Of the installed package, which has it from pyproject.toml; of a folder that is only on the
    path nobody knows."""
    from importlib import metadata

    try:
        return metadata.version("elastic-adapters")
    except metadata.PackageNotFoundError:
        return "0+unknown"
