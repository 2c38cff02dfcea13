"""Train one elastic super-adapter, search it under a latency budget, export a compact model.

What the commands do, with a run directory:

    from elastic import ExportConfig, SearchConfig, TrainConfig, export, search, train

    train(TrainConfig(run="runs/mine"))
    search(SearchConfig(run="runs/mine"))
    export(ExportConfig(run="runs/mine"))

The same on a model in memory:

    net = elastic.attach(model, tokenizer)
    net.fit(rows)
    front = net.search(accuracy=my_score, latency="params", at_most="80%")
    elastic.save_compact(net.compact(front.best), "small", tokenizer)

Names are resolved when first used, so importing costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic.attached.attach import attach, reattach
    from elastic.attached.model import ElasticModel, save_compact
    from elastic.config import (
        AdapterConfig,
        BudgetConfig,
        EvaluateConfig,
        ExportConfig,
        LatencyConfig,
        ModelConfig,
        RecoveryConfig,
        ScheduleConfig,
        SearchConfig,
        StageConfig,
        TaskConfig,
        TimingConfig,
        TrainConfig,
    )
    from elastic.errors import ElasticError
    from elastic.formats.saving import compact
    from elastic.recovery.command import export, search
    from elastic.run import Run
    from elastic.searching.by_function import ParetoFront, Scored
    from elastic.serving.load import load
    from elastic.spaces.bound import SubAdapter
    from elastic.spaces.declared import SearchSpace
    from elastic.supernet.compact import sliced
    from elastic.supernet.supernet import Supernet
    from elastic.training.command import train
    from elastic.training.own_loop import ElasticCallback

_WHERE = {
    "AdapterConfig": "config",
    "BudgetConfig": "config",
    "ElasticCallback": "training.own_loop",
    "ElasticError": "errors",
    "ElasticModel": "attached.model",
    "EvaluateConfig": "config",
    "ExportConfig": "config",
    "LatencyConfig": "config",
    "ModelConfig": "config",
    "ParetoFront": "searching.by_function",
    "RecoveryConfig": "config",
    "Run": "run",
    "ScheduleConfig": "config",
    "Scored": "searching.by_function",
    "SearchConfig": "config",
    "SearchSpace": "spaces.declared",
    "StageConfig": "config",
    "SubAdapter": "spaces.bound",
    "Supernet": "supernet.supernet",
    "TaskConfig": "config",
    "TimingConfig": "config",
    "TrainConfig": "config",
    "attach": "attached.attach",
    "compact": "formats.saving",
    "export": "recovery.command",
    "load": "serving.load",
    "reattach": "attached.attach",
    "save_compact": "attached.model",
    "search": "recovery.command",
    "sliced": "supernet.compact",
    "train": "training.command",
}

__all__ = [
    "AdapterConfig", "BudgetConfig", "ElasticCallback", "ElasticError", "ElasticModel",
    "EvaluateConfig", "ExportConfig", "LatencyConfig", "ModelConfig", "ParetoFront",
    "RecoveryConfig", "Run", "ScheduleConfig", "Scored", "SearchConfig", "SearchSpace",
    "StageConfig", "SubAdapter", "Supernet", "TaskConfig", "TimingConfig", "TrainConfig", "attach",
    "compact", "export", "load", "reattach", "save_compact", "search", "sliced", "train",
]  # fmt: skip
__version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _WHERE:
        raise AttributeError(f"module 'elastic' has no attribute {name!r}")
    return getattr(importlib.import_module(f"elastic.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    """Of the installed package, which has it from pyproject.toml; of a folder that is only on the
    path nobody knows."""
    from importlib import metadata

    try:
        return metadata.version("elastic-adapters")
    except metadata.PackageNotFoundError:
        return "0+unknown"
