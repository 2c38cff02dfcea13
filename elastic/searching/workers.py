"""Several processes, on one machine or on many, at work on one Optuna study."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DatabaseError

from elastic.config.search import without_password
from elastic.console import say
from elastic.errors import MissingExtra, RunError
from elastic.files import clear_leftovers, lock, named_failure, scratch

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
LONG = 10.0
"""Seconds after which it is said whom one waits for."""
_WORKER = "worker "
_NUMBERS = itertools.count()
_HERE: set[str] = set()
"""Workers of this process, each in its block."""


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
        file = Path(place).absolute()
        return JournalStorage(Journal(str(file), JournalLock(file)))
    except ImportError as error:
        remote = str(place).startswith("grpc:")
        package = "grpcio" if remote else error.name or "a database driver"
        shown = without_password(str(place))
        raise MissingExtra(package, "workers", f"study.storage {shown}") from error
    except Exception as error:  # each backend has its own kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        shown = without_password(str(place))
        raise RunError(
            f"study.storage {shown} cannot be reached: {reason.replace(str(place), shown)}; give "
            "the path of a journal file, "
            "sqlite:///FILE, postgresql+psycopg://USER:PASSWORD@HOST/DATABASE or grpc://HOST:PORT"
        ) from error


def _database(url: str) -> RDBStorage:
    """A new database is given its tables, by all workers at once: those who come too late fail,
    and find them when they try again."""
    _make_file(url)
    waiting = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    for _ in range(TRIES - 1):
        try:
            return RDBStorage(url, engine_kwargs=waiting)
        except DatabaseError:
            time.sleep(0.5)
    return RDBStorage(url, engine_kwargs=waiting)


def _make_file(url: str) -> None:
    """A new database of SQLite appears with all its tables and indices, which it makes one by one:
    killed in between, it would take every study for a new one."""
    place = make_url(url)
    file = Path(place.database or "")
    is_file = place.get_backend_name() == "sqlite" and file.name and ":" not in str(file)
    if not is_file or not file.parent.is_dir():
        return
    clear_leftovers(file.parent)  # of one that was killed when it had been made
    if file.exists():
        return
    with scratch(file.parent) as building:
        new = building / file.name
        RDBStorage(f"sqlite:///{new}").engine.dispose()
        try:
            os.link(new, file)
        except OSError:  # another worker's is there, or files have one name here
            if not file.exists():
                os.replace(new, file)


class Journal(JournalFileBackend):
    """Names its file when the disk is full."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with named_failure(Path(self._file_path)):
            super().append_logs(logs)


class JournalLock(JournalFileOpenLock):
    """Held while a line is appended to a journal. A lock of the file itself, which ends with its
    process and leaves nothing behind; where files cannot be locked, Optuna's, a file beside it.

    What a kill or a full disk left of a line is cut: the next one would be appended to it, and
    nobody could read the journal from there on.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(str(file))
        self._file = file
        self._held = contextlib.ExitStack()

    def acquire(self) -> bool:
        told = f"{self._file}: waiting for {{}}, which has locked it"
        with contextlib.ExitStack() as held:
            alone = held.enter_context(
                lock(self._file, wait=True, say=lambda who: say(told.format(who)), after=LONG)
            )
            if not alone and super().acquire():
                held.callback(super().release)
            _cut_unfinished(self._file)
            self._held = held.pop_all()
        return True

    def release(self) -> None:
        self._held.close()


def _cut_unfinished(journal: Path) -> None:
    """Cut a last line without its end."""
    with journal.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read(1) in (b"", b"\n"):
            return
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
    say(f"{journal}: cut an unfinished last line of {size - whole} bytes, left by a kill or a full "
        "disk")  # fmt: skip


class Worker:
    """This process as one of those that share a study; inside the block it shows signs of life.

    The leader, the living worker that came first, prepares the study and gives trials of the dead
    back to the queue under their numbers.
    """

    def __init__(self, study: optuna.Study, clock: Callable[[], float] = time.monotonic) -> None:
        self.study = study
        pid = os.getpid()
        self._machine = _machine()
        self.name = f"{self._machine}/{pid}/{_started(pid)}/{next(_NUMBERS)}"
        self._clock = clock
        self._order = 0
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live_on, daemon=True)
        self._seen: dict[str, tuple[int, float]] = {}
        self._unnamed: dict[tuple[int, datetime | None], float] = {}

    def __enter__(self) -> Worker:
        self._order = len(self._workers())
        _HERE.add(self.name)
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        _HERE.discard(self.name)
        # Where the study cannot be written, what ended the block says so.
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            self._tell(0)

    def living(self) -> dict[str, int]:
        """Workers that are alive, with the order in which they came.

        Where processes of this machine can be seen the process is looked for; elsewhere signs of
        life must go on, by the clock of this machine."""
        found = {}
        for name, (order, beats) in self._workers().items():
            machine, pid, began, _ = name.rsplit("/", 3)
            if name == self.name:
                found[name] = order
            elif beats and machine == self._machine:
                # One of this process may have been unable to say that it ended.
                here = int(pid) == os.getpid()
                if name in _HERE if here else _runs(int(pid), int(began)):
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
            self.wait_to_lead(until=name)
            if name not in self.study.user_attrs:
                self.study.set_user_attr(name, make())
        return self.study.user_attrs[name]

    def wait_to_lead(self, until: str | None = None) -> None:
        """For those that came before to end, or for what the study keeps under a name."""
        said = False
        while (first := _first(self.living())) != self.name and until not in self.study.user_attrs:
            if not said:
                machine, pid, _, _ = first.rsplit("/", 3)
                host = machine.partition("/")[0]
                say(f"Waiting for process {pid} on {host}, which searches too")
            said = True
            time.sleep(POLL)

    def take(self, trial: Trial) -> None:
        """Say whose this trial is."""
        trial.set_user_attr("worker", self.name)

    def holds(self, trial: Trial) -> bool:
        """Whether it is still this worker's: one that was silent for too long has lost it."""
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        mine = [each for each in running if each.number == trial.number]
        return any(each.user_attrs.get("worker") == self.name for each in mine)

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
            # One that cannot be given is given the next time; the search itself meets the cause.
            with contextlib.suppress(Exception):
                self._beat()

    def _beat(self) -> None:
        self._beats += 1
        self._tell(self._beats)

    def _tell(self, beats: int) -> None:
        self.study.set_user_attr(_WORKER + self.name, [self._order, beats])


class Alone:
    """Instead of a `Worker`, of a study that nobody else is at, and that keeps no names."""

    def running(self) -> list[FrozenTrial]:
        return []

    def take(self, trial: Trial) -> None:
        pass

    def holds(self, trial: Trial) -> bool:
        return True

    def gives_way(self, trial: Trial) -> bool:
        return False


def _first(living: Mapping[str, int]) -> str:
    """The one of them that came first."""
    return min(living, key=lambda name: (living[name], name))


def _machine() -> str:
    """What two processes share that can see each other, and no others: host, boot and, on Linux,
    the namespace of process numbers. Where these are unknown nobody is seen."""
    host = socket.gethostname()
    if sys.platform != "linux":
        return host
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{host}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{host}/{uuid.uuid4().hex}"


def _started(pid: int) -> int:
    """When a process began, in ticks since boot on Linux: a clock that is set moves psutil's
    seconds. psutil.NoSuchProcess if there is none."""
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            return int(stat.rpartition(")")[2].split()[19])
        except OSError:
            raise psutil.NoSuchProcess(pid) from None
    return int(psutil.Process(pid).create_time())


def _runs(pid: int, started: int) -> bool:
    try:
        return _started(pid) == started and bool(
            psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        )
    except psutil.Error:
        return False
