"""`elastic train`: one task, several one after another, or what either will need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from elastic.config import TrainConfig
from elastic.console import busy
from elastic.errors import ConfigError
from elastic.models import loading
from elastic.models.kinds import Kind
from elastic.run import Run
from elastic.training.sequence import Sequential, stage_configs, train_sequence

if TYPE_CHECKING:
    from elastic.data.given import Rows
    from elastic.data.task import Split
    from elastic.training.estimate import Estimate


def train(
    config: TrainConfig, data: Mapping[Split, Rows] | None = None
) -> Run | Sequential | Estimate:
    """`elastic train`: one task, or `tasks` one after another; or what either will need.

    `data` are rows by split (train, test, perhaps validation), such as DataFrames: they are kept
    as files of the run, and the settings of `task` say what their fields mean. ConfigError for
    settings that do not go together, before weights load.
    """
    if data is not None:
        if config.tasks or config.dry_run:
            raise ConfigError("data: rows given from Python are trained on; leave out tasks and "
                              "dry_run, which read files")  # fmt: skip
        from elastic.training.rows import kept

        config = kept(config, data)
    if config.tasks and loading.kind_of_base(config.model) is Kind.CLASSIFIER:
        raise ConfigError(
            f"tasks: a sequence is answered with text, {config.model.path} has a classification "
            "head; choose model.head language"
        )
    if config.tasks and config.adapter.method == "auto":
        config = replace(config, adapter=replace(config.adapter, method="olora"))
    if config.dry_run:
        from elastic.training.dry_run import estimate

        with busy("trying a step without data"):
            return estimate(*(stage_configs(config) if config.tasks else [config]))
    if config.tasks:
        return train_sequence(config)
    from elastic.training import one_task  # takes seconds to import, which a dry run does without

    return one_task.train_one(config)
