"""Workers on one study: none does what another does, and what a dead one was at is done again."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.storages import run_grpc_proxy_server
from optuna.trial import TrialState

from elastic.run import Run
from elastic.searching import workers
from elastic.searching.objective import Objective
from elastic.searching.study import search
from elastic.searching.workers import Worker, open_storage
from tests.helpers import searches
from tests.helpers.tiny_runs import copy_run
from tests.programs.searching import KILLED_AT, config_of, together

pytestmark = pytest.mark.usefixtures("fake_latency")

TRIALS, WORKERS = 14, 4


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def storage(request, tmp_path):
    """Where the study is kept, by kind."""
    if request.param == "journal":
        yield ""  # in the run's own directory
    else:  # whose server keeps it in SQLite
        port, pool = free_port(), ThreadPoolExecutor(4)
        behind = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'behind.db'}")
        threading.Thread(
            target=run_grpc_proxy_server, args=(behind,), daemon=True,
            kwargs={"host": "127.0.0.1", "port": port, "thread_pool": pool},
        ).start()  # fmt: skip
        yield f"grpc://127.0.0.1:{port}"


def in_a_program(run: Run, storage: str) -> list[int]:
    """The same from a process of their own: one with a server of gRPC does not fork well."""
    program = Path(__file__).parents[1] / "programs" / "searching.py"
    done = subprocess.run(
        [sys.executable, str(program), str(run.path), storage, str(WORKERS), str(TRIALS)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "storage", ["journal", pytest.param("grpc", marks=pytest.mark.slow)], indirect=True
)
def test_four_workers_of_which_one_is_killed(trained, tmp_path, storage, capfd):
    run = copy_run(trained, tmp_path / "run")
    config = config_of(run.path, storage, TRIALS)
    codes = in_a_program(run, storage) if storage else together(config, WORKERS)
    assert codes == [-9, 0, 0, 0], capfd.readouterr().err[-3000:]

    asked = [json.loads(line) for line in (run.path / "asked.jsonl").read_text().splitlines()]
    assert len({process for process, _ in asked}) == WORKERS
    times = Counter(json.dumps(sub) for _, sub in asked)
    assert sorted(times.values())[-2:] == [1, 2]  # the dead worker's trial, and no other
    by = Counter(process for process, _ in asked)
    [again] = [sub for sub, count in times.items() if count == 2]
    first, second = (process for process, sub in asked if json.dumps(sub) == again)
    assert first != second and by[first] == KILLED_AT

    study = optuna.load_study(
        study_name="shared", storage=open_storage(storage or None, run.search)
    )
    states = Counter(trial.state for trial in study.trials)
    assert set(states) <= {TrialState.COMPLETE, TrialState.WAITING, TrialState.PRUNED}
    assert TRIALS <= states[TrialState.COMPLETE] <= TRIALS + WORKERS - 1
    assert len(times) == states[TrialState.COMPLETE]
    front = search(config)
    assert len(front.trials) == states[TrialState.COMPLETE]  # nothing was left to do


def study_with(*names: str, storage=None) -> tuple[optuna.Study, dict[str, Worker]]:
    """A study and its workers, which came in this order and have each shown one sign of life."""
    study = optuna.create_study(directions=["maximize", "minimize"], storage=storage)
    found = {}
    for name in names:
        found[name] = Worker(study, clock=lambda: CLOCK[0])
        found[name].name = name
    for order, worker in enumerate(found.values()):
        worker._order = order
        worker._beat()
    return study, found


CLOCK = [0.0]


def test_the_first_living_worker_leads(monkeypatch):
    """Workers of other machines, whose processes cannot be looked for, by their signs of life."""
    CLOCK[0] = 0.0
    _, found = study_with("b/1/1/0", "a/2/2/0", "c/3/3/0")
    assert [worker.leads() for worker in found.values()] == [True, False, False]
    last = found["c/3/3/0"]
    assert last.living() == {"b/1/1/0": 0, "a/2/2/0": 1, "c/3/3/0": 2}
    CLOCK[0] += workers.PATIENCE / 2
    found["a/2/2/0"]._beat()
    assert len(last.living()) == 3
    CLOCK[0] += workers.PATIENCE / 2 + 1  # the first has been silent for too long
    assert last.living() == {"a/2/2/0": 1, "c/3/3/0": 2}
    assert found["a/2/2/0"].leads() and not last.leads()
    found["a/2/2/0"]._tell(0)  # and the second has left
    assert last.leads()


def test_a_process_of_this_machine_is_looked_for(tmp_path):
    study = optuna.create_study()
    me = Worker(study)
    machine, pid, began, _ = me.name.rsplit("/", 3)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    study.set_user_attr(f"worker {machine}/{gone.pid}/0/0", [0, 5])
    study.set_user_attr(f"worker {machine}/{pid}/{int(began) - 100}/0", [1, 5])  # number reused
    with me:
        assert me.living() == {me.name: 2} and me.leads()
    assert study.user_attrs[f"worker {me.name}"] == [2, 0]


def test_who_could_not_say_that_it_ended_is_not_waited_for(monkeypatch):
    """The storage went away; the next search of the same process is alone."""
    study = optuna.create_study()
    with pytest.raises(OSError), Worker(study) as first:
        trial = study.ask()
        first.take(trial)
        monkeypatch.setattr(first, "_tell", None)
        raise OSError
    with Worker(study) as second:
        assert second.leads() and second.running() == []
        assert study.trials[0].state == TrialState.WAITING


@pytest.mark.parametrize("differs", ["boot", "namespace"])
def test_a_process_that_cannot_be_seen_lives_by_its_signs(differs):
    """Two containers may have one host name, and each its own process of a number."""
    CLOCK[0] = 0.0
    study, found = study_with("a/1/1/0")
    me = found["a/1/1/0"]
    me._machine = "host/boot/namespace"
    machine = me._machine.replace(differs, "other")
    study.set_user_attr(f"worker {machine}/999999999/0/0", [1, 1])
    study.set_user_attr(f"worker {me._machine}/999999999/0/0", [2, 1])
    assert list(me.living()) == ["a/1/1/0", f"{machine}/999999999/0/0"]
    CLOCK[0] += workers.PATIENCE + 1
    assert list(me.living()) == ["a/1/1/0"]


def test_a_clock_that_is_set_changes_nobody(monkeypatch):
    """psutil's time of birth is one of boot and a number of seconds; the former moves with it."""
    before = Worker(optuna.create_study())
    boot = psutil.boot_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: boot + 10)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: boot + 10)
    with before:
        assert list(before.living()) == [before.name]
        other = Worker(before.study)
        assert other.name.rsplit("/", 1)[0] == before.name.rsplit("/", 1)[0]
        assert list(other.living()) == [before.name]


def test_what_became_anothers_is_no_longer_held():
    """A worker that was stopped for longer than the others' patience comes back with figures."""
    CLOCK[0] = 0.0
    study, found = study_with("a/1/1/0", "b/2/2/0")
    slow, quick = found.values()
    trial = study.ask()
    slow.take(trial)
    assert slow.holds(trial)
    CLOCK[0] += workers.PATIENCE + 1
    quick._beat()
    quick.running()
    CLOCK[0] += workers.PATIENCE + 1
    quick._beat()
    assert quick.running() == [] and not slow.holds(trial)
    again = study.ask()
    quick.take(again)
    assert again.number == trial.number and quick.holds(again) and not slow.holds(trial)
    study.tell(again, [0.0, 0.0])
    assert not quick.holds(again)


@pytest.mark.parametrize("place", [None, "sqlite:///FOLDER/study.db"])
def test_trials_of_the_dead_return_under_their_numbers(tmp_path, place):
    CLOCK[0] = 0.0
    place = place and place.replace("FOLDER", str(tmp_path))
    names = ("a/1/1/0", "b/2/2/0", "c/3/3/0")
    study, found = study_with(*names, storage=open_storage(place, tmp_path))
    first, second, third = found.values()
    trials = [study.ask() for _ in range(3)]
    for trial, worker in zip(trials, (first, second, first), strict=True):
        trial.suggest_int("group", 0, 9)
        worker.take(trial)
    unnamed = study.ask()
    assert [trial.number for trial in second.running()] == [0, 1, 2, 3]
    CLOCK[0] += workers.PATIENCE + 1
    second._beat(), third._beat()
    assert [trial.number for trial in second.running()] == [1]  # the first is dead
    again = study.ask()
    assert again.number == 0 and again.params == trials[0].params
    assert [trial.number for trial in second.running()] == [0, 1]  # no longer the dead one's
    assert study.ask().number == 2 and study.ask().number == unnamed.number


def test_a_trial_that_nobody_took_is_given_back_in_the_end():
    """Its worker died between asking for it and saying so."""
    CLOCK[0] = 0.0
    study, found = study_with("a/1/1/0", "b/2/2/0")
    study.ask()
    first = found["a/1/1/0"]
    assert len(first.running()) == 1
    CLOCK[0] += workers.PATIENCE + 1
    for worker in found.values():
        worker._beat()
    assert first.running() == [] and study.trials[0].state == TrialState.WAITING
    assert study.ask().number == 0 and len(first.running()) == 1  # asked for anew


def test_a_worker_that_does_not_lead_gives_nothing_back():
    CLOCK[0] = 0.0
    study, found = study_with("a/1/1/0", "b/2/2/0", "c/3/3/0")
    found["c/3/3/0"].take(study.ask())
    found["c/3/3/0"]._tell(0)
    assert found["b/2/2/0"].running() == []
    assert study.trials[0].state == TrialState.RUNNING
    assert found["a/1/1/0"].running() == []
    assert study.trials[0].state == TrialState.WAITING


@pytest.mark.parametrize("finished", [True, False])
def test_figures_for_a_trial_that_went_to_another_are_dropped(
    trained, tmp_path, monkeypatch, capsys, finished
):
    """While it was measured the others took this worker for dead."""
    run, calls, call = copy_run(trained, tmp_path / "run"), [], Objective.__call__

    def taken(self, sub, *rivals):
        figures = call(self, sub, *rivals)
        calls.append(sub)
        if len(calls) == 3:
            study = optuna.load_study(study_name="run", storage=open_storage(None, run.search))
            [trial] = study.get_trials(states=[TrialState.RUNNING])
            if finished:
                study._storage.set_trial_user_attr(trial._trial_id, "figures", figures.as_dict())
                study.tell(trial.number, [0.0, 0.0])
            else:
                Worker(study)._give_back(trial)
        return figures

    monkeypatch.setattr(Objective, "__call__", taken)
    front = search(searches.config(run))
    assert len(front.trials) == 8 and len(calls) == 8 + (not finished)
    assert "Trial 2 went to another worker" in " ".join(capsys.readouterr().err.split())
