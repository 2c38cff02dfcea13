"""Several processes, on one machine or on many, at work on one Optuna study."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import DatabaseError

from elastic.errors import MissingExtra, RunError

BEAT = 10.0
"""Seconds between signs of life."""
PATIENCE = 6 * BEAT
"""Seconds without one after which a worker on another machine is taken for dead."""
POLL = 0.5
"""Seconds between looks at what other workers have done."""
CONNECT = 10.0
"""Seconds to wait for a gRPC proxy."""
TRIES = 3
"""To create the tables of a database."""
_WORKER = "worker "
_NUMBERS = itertools.count()


def experimental() -> warnings.catch_warnings:
    """Inside it Optuna does not warn of what it calls experimental: its version is bounded."""
    return warnings.catch_warnings(action="ignore", category=ExperimentalWarning)


def open_storage(place: str | None, folder: Path) -> BaseStorage:
    """What `study.storage` names: unset a journal file in `folder`, grpc://HOST:PORT, another URL
    for a database, or the path of a journal file. RunError if it cannot be reached, MissingExtra
    without its driver."""
    try:
        if place is None:
            folder.mkdir(parents=True, exist_ok=True)
            place = str(folder / "study.journal")
        if place.startswith("grpc://"):
            host, _, port = place.removeprefix("grpc://").partition(":")
            with experimental():
                proxy = GrpcStorageProxy(host=host, port=int(port or 13000))
            proxy.wait_server_ready(timeout=CONNECT)
            return proxy
        if "://" in place:
            return _database(place)
        if not Path(place).parent.is_dir():
            raise FileNotFoundError(f"no directory {Path(place).parent}")
        return JournalStorage(JournalFileBackend(place))
    except ImportError as error:
        remote = str(place).startswith("grpc:")
        package = "grpcio" if remote else error.name or "a database driver"
        raise MissingExtra(package, "workers", f"study.storage {place}") from error
    except Exception as error:  # each backend has its own kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(
            f"study.storage {place} cannot be reached: {reason}; give the path of a journal file, "
            "sqlite:///FILE, postgresql+psycopg://USER:PASSWORD@HOST/DATABASE or grpc://HOST:PORT"
        ) from error


def _database(url: str) -> RDBStorage:
    """A new database is given its tables, by all workers at once: those who come too late fail,
    and find them when they try again."""
    waiting = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    for _ in range(TRIES - 1):
        try:
            return RDBStorage(url, engine_kwargs=waiting)
        except DatabaseError:
            time.sleep(0.5)
    return RDBStorage(url, engine_kwargs=waiting)


class Worker:
    """This process as one of those that share a study; inside the block it shows signs of life.

    The leader, the living worker that came first, prepares the study and gives trials of the dead
    back to the queue under their numbers.
    """

    def __init__(self, study: optuna.Study, clock: Callable[[], float] = time.monotonic) -> None:
        self.study = study
        started = int(psutil.Process().create_time())
        self.name = f"{socket.gethostname()}/{os.getpid()}/{started}/{next(_NUMBERS)}"
        self._clock = clock
        self._order = 0
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live_on, daemon=True)
        self._seen: dict[str, tuple[int, float]] = {}
        self._unnamed: dict[tuple[int, datetime | None], float] = {}

    def __enter__(self) -> Worker:
        self._order = len(self._workers())
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._tell(0)

    def living(self) -> dict[str, int]:
        """Workers that are alive, with the order in which they came.

        On this machine the process is looked for; elsewhere signs of life must go on, by the clock
        of this machine."""
        host, found = self.name.split("/")[0], {}
        for name, (order, beats) in self._workers().items():
            if name == self.name:
                found[name] = order
            elif beats and name.split("/")[0] == host:
                if _runs(*map(int, name.split("/")[1:3])):
                    found[name] = order
            elif beats:
                before, since = self._seen.get(name, (0, 0.0))
                if beats != before:
                    self._seen[name] = before, since = beats, self._clock()
                if self._clock() - since < PATIENCE:
                    found[name] = order
        return found

    def leads(self) -> bool:
        return self.name == _first(self.living())

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What the study keeps under this name, made once, by the leader."""
        while name not in self.study.user_attrs:
            if self.leads():
                self.study.set_user_attr(name, make())
            else:
                time.sleep(POLL)
        return self.study.user_attrs[name]

    def take(self, trial: Trial) -> None:
        """Say whose this trial is."""
        trial.set_user_attr("worker", self.name)

    def running(self) -> list[FrozenTrial]:
        """Trials that a living worker is at. The leader first gives those of the dead back."""
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        living = self.living()  # after the trials, or a newcomer's would look lost
        lost = [trial for trial in trials if self._lost(trial, living)]
        if lost and self.name == _first(living):
            for trial in lost:
                with contextlib.suppress(UpdateFinishedTrialError):  # its last act was to finish it
                    self._give_back(trial)
        return [trial for trial in trials if trial not in lost]

    def _give_back(self, trial: FrozenTrial) -> None:
        """To the queue, under its number, on which a proposal depends.

        The one private use of Optuna: as of 5.0 `Study.tell` takes finished states alone, and
        failing a trial and enqueueing its like are two writes, between which a leader that dies
        loses the trial or has it done twice. A release that lets a study requeue a trial ends it.
        """
        storage, identity = self.study._storage, trial._trial_id
        # Nobody's before it can be asked for, or it would look lost to the next look.
        storage.set_trial_user_attr(identity, "worker", None)
        storage.set_trial_state_values(identity, TrialState.WAITING)

    def gives_way(self, trial: Trial) -> bool:
        """Whether another worker is at this trial (databases without row locks may hand one out
        twice), or at another one of the same parameters; then this one is not to be measured here.
        Two that see each other both give way and ask again; none is measured twice."""
        running = {other.number: other for other in self.running()}
        mine = running.pop(trial.number, None)
        if mine is None or mine.user_attrs.get("worker") != self.name:
            return True
        if any(other.params == trial.params for other in running.values()):
            self.study.tell(trial, state=TrialState.PRUNED)
            return True
        return False

    def _lost(self, trial: FrozenTrial, living: dict[str, int]) -> bool:
        worker = trial.user_attrs.get("worker")
        if worker is not None:
            return worker not in living
        # Asked for a moment ago, or its worker died in that moment.
        since = self._unnamed.setdefault((trial.number, trial.datetime_start), self._clock())
        return len(living) == 1 or self._clock() - since > PATIENCE

    def _workers(self) -> dict[str, tuple[int, int]]:
        return {
            key.removeprefix(_WORKER): tuple(value)
            for key, value in self.study.user_attrs.items()
            if key.startswith(_WORKER)
        }

    def _live_on(self) -> None:
        while not self._stop.wait(BEAT):
            self._beat()

    def _beat(self) -> None:
        self._beats += 1
        self._tell(self._beats)

    def _tell(self, beats: int) -> None:
        self.study.set_user_attr(_WORKER + self.name, [self._order, beats])


def _first(living: Mapping[str, int]) -> str:
    """The one of them that came first."""
    return min(living, key=lambda name: (living[name], name))


def _runs(pid: int, started: int) -> bool:
    try:
        process = psutil.Process(pid)
        recent: bool = abs(process.create_time() - started) < 2
        return recent and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
