"""Trackers, which show elsewhere how a run goes: those of a search, and what training's need.

In training the Trainer's own integrations report. Nothing leaves this machine unless the user says
so in the tracker's own way: WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID. What is kept here is
below the run, but for Trackio's, which has one place for all projects.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from elastic.config.search import TRACKERS
from elastic.console import say
from elastic.distributed import is_main
from elastic.errors import ConfigError, MissingExtra, unknown
from elastic.plain import one_line

PROJECT = "elastic-adapters"
"""What runs stand under, unless the tracker's own variable says otherwise."""


class Tracker(NamedTuple):
    """A run that is open."""

    log: Callable[[Mapping[str, float], int], object]
    """Figures by name, at a step."""
    close: Callable[[], object]


def require(names: Iterable[str], others: Collection[str] = ()) -> None:
    """ConfigError for a tracker that is neither known here nor among the `others`, MissingExtra for
    one that is not installed."""
    for name in names:
        if name in others:
            continue
        if name not in TRACKERS:
            raise ConfigError(f"report_to: {unknown('tracker', name, {*TRACKERS, *others})}")
        found = find_spec(name)
        # A folder of that name, such as wandb's own, passes for a package without an origin.
        if found is None or found.origin is None:
            raise MissingExtra(name, name, f"report_to {name}")


class Reports:
    """Runs of trackers that one process fills; a context manager, and nothing without names.

    A tracker that fails is left out from then on: no figure is worth the search that has it.
    """

    def __init__(
        self, names: Iterable[str], folder: Path, name: str, settings: Mapping[str, Any]
    ) -> None:
        """`folder`: where files go; `name`: of the run there; `settings`: what is shown of it."""
        self._asked = list(dict.fromkeys(names))
        self._about = folder, name, settings
        self._open: dict[str, Tracker] = {}

    def __enter__(self) -> Reports:
        for kind in self._asked:
            with self._or_without(kind):
                self._open[kind] = OPEN[kind](*self._about)
        return self

    def __exit__(self, *error: object) -> None:
        for kind in [*self._open]:
            with self._or_without(kind):
                self._open[kind].close()

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """In every tracker; steps grow."""
        for kind in [*self._open]:
            with self._or_without(kind):
                self._open[kind].log(figures, step)

    @contextlib.contextmanager
    def _or_without(self, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each has its own kinds
            self._open.pop(kind, None)
            say(f"report_to {kind}: {type(error).__name__}: {one_line(error)}; it gets no more")


@contextlib.contextmanager
def beside_trainer(names: Collection[str], folder: Path, name: str) -> Iterator[None]:
    """Inside, what the Trainer's integrations report into: they take a run that is open already,
    and would begin one that goes over the network, or into the current folder."""
    with contextlib.ExitStack() as stack:
        for kind in ("mlflow", "wandb"):
            if kind in names and is_main():
                stack.callback(OPEN[kind](folder, name, {}).close)
        yield


def _tensorboard(folder: Path, name: str, settings: Mapping[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    for key, value in _flat(settings):
        writer.add_text(key, value, 0)

    def log(figures: Mapping[str, float], step: int) -> None:
        for key, value in figures.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return Tracker(log, writer.close)


def _wandb(folder: Path, name: str, settings: Mapping[str, Any]) -> Tracker:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=name,
        dir=os.environ.get("WANDB_DIR", str(folder)),
        mode=os.environ.get("WANDB_MODE", "offline"),
        config=dict(settings),
        settings=wandb.Settings(console="off"),  # it would take hold of what draws the bars
    )
    return Tracker(lambda figures, step: run.log(dict(figures), step=step), run.finish)


def _mlflow(folder: Path, name: str, settings: Mapping[str, Any]) -> Tracker:
    import mlflow

    ended = contextlib.ExitStack()
    if not mlflow.is_tracking_uri_set():
        folder.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{folder.resolve() / 'mlflow.db'}")
        ended.callback(mlflow.set_tracking_uri, None)  # the next run has a place of its own
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    mlflow.start_run(run_name=name)
    ended.callback(mlflow.end_run)
    mlflow.log_params({key: value[:500] for key, value in _flat(settings)})
    return Tracker(lambda figures, step: mlflow.log_metrics(dict(figures), step), ended.close)


def _trackio(folder: Path, name: str, settings: Mapping[str, Any]) -> Tracker:
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    trackio.init(project=project, name=name, config=dict(settings), resume="allow")
    return Tracker(lambda figures, step: trackio.log(dict(figures), step=step), trackio.finish)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


OPEN: dict[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    "mlflow": _mlflow,
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
}
