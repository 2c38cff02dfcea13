"""Every setting with its default: frozen dataclasses, one root for each command. Imports nothing
of `elastic` but its errors and files, and no torch."""

from elastic.config.adapter import (
    AdapterConfig,
    OloraConfig,
    ProloraConfig,
    SorsaConfig,
    SosLoraConfig,
)
from elastic.config.compensation import CompensationConfig
from elastic.config.evaluate import EvaluateConfig
from elastic.config.export import ExportConfig, HfConfig, MergeAdapterConfig, MergeConfig
from elastic.config.latency import LatencyConfig, TableConfig, TimingConfig
from elastic.config.model import ModelConfig, TaskConfig
from elastic.config.recovery import RecoveryConfig
from elastic.config.search import BudgetConfig, SearchConfig, StudyConfig
from elastic.config.space import SpaceImportConfig, SpaceShowConfig
from elastic.config.train import (
    ScheduleConfig,
    SequenceConfig,
    StageConfig,
    TrainConfig,
    VocabConfig,
)

__all__ = [
    "AdapterConfig", "BudgetConfig", "CompensationConfig", "EvaluateConfig", "ExportConfig",
    "HfConfig", "LatencyConfig", "MergeAdapterConfig", "MergeConfig", "ModelConfig", "OloraConfig",
    "ProloraConfig", "RecoveryConfig", "ScheduleConfig", "SearchConfig", "SequenceConfig",
    "SorsaConfig", "SosLoraConfig", "SpaceImportConfig", "SpaceShowConfig", "StageConfig",
    "StudyConfig", "TableConfig", "TaskConfig", "TimingConfig", "TrainConfig", "VocabConfig",
]  # fmt: skip
