"""Trackers get every figure, stay on this machine, and never cost a search. TensorBoard is real;
the others are stand-ins that keep what they are called with (run by hand: the real ones)."""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types

import pytest

from elastic import trackers
from elastic.errors import ConfigError, MissingExtra
from elastic.trackers import Reports, beside_trainer

FIGURES = {"search/accuracy": 0.5, "search/prefill_ms": 12.0}
SETTINGS = {"trials": 8, "budget": {"prefill_ms": "80%"}}
OTHERS = ("mlflow", "trackio", "wandb")


class Calls(list):
    """What was called, by name, with which arguments."""

    def __call__(self, name, returned=None):
        return lambda *args, **kwargs: (self.append((name, args, kwargs)), returned)[1]

    def named(self, name):
        return [(args, kwargs) for called, args, kwargs in self if called == name]


@pytest.fixture
def calls(monkeypatch):
    """The three that bring servers of their own, as modules that only note."""
    noted = Calls()
    run = types.SimpleNamespace(log=noted("log"), finish=noted("finish"))
    contents = {
        "wandb": {"init": noted("init", run), "Settings": lambda **kwargs: kwargs},
        "trackio": {name: noted(name) for name in ("init", "log", "finish")},
        "mlflow": {
            "is_tracking_uri_set": lambda: False,
            **{name: noted(name) for name in ("set_tracking_uri", "set_experiment", "start_run",
                                              "log_params", "log_metrics", "end_run")},
        },
    }  # fmt: skip
    for name, attributes in contents.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="a stand-in")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    for variable in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    return noted


def reported(name, folder):
    with Reports([name], folder, "mine-search", SETTINGS) as reports:
        reports.log(FIGURES, 1)
        reports.log({"front-1/accuracy": 0.25}, 2)


def test_tensorboard_has_every_figure_and_setting(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reported("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in
            events.Tags()["scalars"]} == {
        "search/accuracy": [(1, 0.5)], "search/prefill_ms": [(1, 12.0)],
        "front-1/accuracy": [(2, 0.25)],
    }  # fmt: skip
    assert "budget.prefill_ms/text_summary" in events.Tags()["tensors"]


@pytest.mark.parametrize("name", OTHERS)
def test_every_tracker_gets_every_figure_and_is_closed(calls, tmp_path, name):
    reported(name, tmp_path)
    log = "log_metrics" if name == "mlflow" else "log"
    told = [(args[0], kwargs.get("step", args[-1])) for args, kwargs in calls.named(log)]
    assert told == [(FIGURES, 1), ({"front-1/accuracy": 0.25}, 2)]
    assert ("end_run" if name == "mlflow" else "finish") in [name for name, *_ in calls[-2:]]


def test_nothing_leaves_this_machine_unless_the_user_says_so(calls, tmp_path, monkeypatch):
    reported("wandb", tmp_path)
    reported("mlflow", tmp_path)
    [(_, begun)] = calls.named("init")
    assert begun["mode"] == "offline" and begun["dir"] == str(tmp_path)
    assert begun["project"] == "elastic-adapters" and begun["name"] == "mine-search"
    places = [place for (place,), _ in calls.named("set_tracking_uri")]
    assert places == [f"sqlite:///{tmp_path}/mlflow.db", None]  # left as it was
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setattr(sys.modules["mlflow"], "is_tracking_uri_set", lambda: True)
    calls.clear()
    reported("wandb", tmp_path)
    reported("mlflow", tmp_path)
    [(_, begun)] = calls.named("init")
    assert begun["mode"] == "online" and begun["project"] == "theirs"
    assert not calls.named("set_tracking_uri")


def test_the_trainer_finds_runs_that_are_open_and_they_end_with_it(calls, tmp_path):
    with contextlib.suppress(ValueError), beside_trainer(OTHERS, tmp_path, "mine-train"):
        names = [name for name, *_ in calls]
        assert names.count("init") == names.count("start_run") == 1  # Trackio's is the Trainer's
        raise ValueError("training failed")
    assert {"finish", "end_run"} <= {name for name, *_ in calls[-3:]}


def test_other_processes_report_nothing(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with beside_trainer(OTHERS, tmp_path, "mine-train"):
        assert not calls


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_a_tracker_that_fails_costs_nothing_but_itself(calls, tmp_path, monkeypatch, capsys, when):
    def fails(*args, **kwargs):
        raise ConnectionError("no\nserver")

    monkeypatch.setattr(sys.modules["trackio"], when, fails)
    with Reports(["trackio", "wandb"], tmp_path, "mine", SETTINGS) as reports:
        reports.log(FIGURES, 1)
        reports.log(FIGURES, 2)
    told = capsys.readouterr().err.splitlines()
    assert told == ["report_to trackio: ConnectionError: no server; it gets no more"]
    assert len([1 for args, kwargs in calls.named("log") if kwargs["step"] == 2]) == (
        2 if when == "finish" else 1
    )


def test_a_tracker_that_is_unknown_or_missing_says_what_would_work(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"'wandbb'; did you mean 'wandb'\?"):
        trackers.require(["wandbb"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"report_to wandb needs wandb, .*adapters\[wandb\]"):
        trackers.require(["wandb"])
    # The folder that wandb writes looks like a package to Python.
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingExtra):
        trackers.require(["wandb"])
    trackers.require(["comet_ml"], others=["comet_ml"])
