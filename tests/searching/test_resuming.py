"""A search goes on where it was stopped, and is no other one's. Latency is a function of the
parameter count here; accuracy is real."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from elastic.errors import RunError
from elastic.searching import study
from elastic.searching.objective import Objective
from elastic.searching.study import search
from elastic.spaces.bound import Candidate
from tests.helpers.searches import (
    choices_task,
    config,
    front_of,
    measured,
    sub_of,
    trials_of,
)
from tests.helpers.tiny_runs import copy_run, randomize_factors

pytestmark = pytest.mark.usefixtures("fake_latency")


def test_more_trials_continue_a_study(trained, tmp_path, asked):
    whole = copy_run(trained, tmp_path / "whole")
    search(config(whole, starts=8))
    asked.clear()
    run = copy_run(trained, tmp_path / "run")
    search(config(run, trials=4, starts=8))
    first = measured(run)
    assert len(asked) == 4 == len(first)
    search(config(run, trials=8, starts=8))
    assert len(asked) == 8 == len(set(asked))
    assert measured(run)[:4] == first
    # All eight were settled at the start: stopping in between makes no difference.
    assert trials_of(run) == trials_of(whole)
    assert front_of(run) == front_of(whole)
    asked.clear()
    search(config(run, trials=8, starts=8))
    assert asked == []
    assert front_of(run) == front_of(whole)


def test_a_resumed_sampler_brings_new_sub_adapters(trained, tmp_path, asked):
    run = copy_run(trained, tmp_path / "run")
    for trials in (6, 12):
        wanted = config(run, trials=trials, sampler="random", starts=2)
        search(wanted)
        assert len(asked) == trials == len(set(asked))
        assert len(study._open_study(run, wanted)[0].trials) == trials  # nothing was proposed twice


@pytest.mark.parametrize("starts, killed_at", [(8, 2), (12, 3), (2, 6)])
def test_a_killed_search_loses_nothing(trained, tmp_path, monkeypatch, starts, killed_at):
    """Killed while a sub-adapter is measured: that one is measured first when the search goes
    on. With more starts than trials there is a queue it could be lost behind."""
    run = copy_run(trained, tmp_path / "run")
    seen, call = [], Objective.__call__

    def killed(self, sub, *rivals):
        seen.append(sub)
        if len(seen) == killed_at:
            raise KeyboardInterrupt
        return call(self, sub, *rivals)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            search(config(run, starts=starts))
        search(config(run, starts=starts))
    assert seen[killed_at] == seen[killed_at - 1]
    assert len(seen) == 8 + 1 and len(set(seen)) == 8
    assert [Candidate(sub_of(row)) for row in trials_of(run)] == list(dict.fromkeys(seen))
    if starts == 8:  # nothing was left to the sampler
        whole = copy_run(trained, tmp_path / "whole")
        search(config(whole, starts=starts))
        assert trials_of(run) == trials_of(whole)
        assert front_of(run) == front_of(whole)


def test_an_interrupted_search_leaves_a_front(trained, tmp_path, monkeypatch):
    run, call, calls = copy_run(trained, tmp_path / "run"), Objective.__call__, []

    def interrupted(self, sub, *rivals):
        calls.append(sub)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return call(self, sub, *rivals)

    monkeypatch.setattr(Objective, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(config(run, starts=6))
    assert len(trials_of(run)) == 5 and front_of(run)
    assert run.chosen("best").candidate in calls


def test_a_search_with_other_settings_is_refused(trained, tmp_path, forbid_weights):
    run = copy_run(trained, tmp_path / "run")
    study._open_study(run, config(run))[0].enqueue_trial({})
    for change, named in (
        ({"seed": 1}, "seed"),
        ({"sampler": "tpe"}, "sampler"),
        ({"objectives": ["accuracy", "decode_ms"]}, "objectives"),
    ):
        with pytest.raises(RunError, match=rf"other settings: {named} .*or delete"):
            search(config(run, **change))
    again, _ = study._open_study(run, config(run, trials=99))  # more trials are no other search
    assert len(again.trials) == 1


def test_a_study_of_another_super_adapter_or_task_is_refused(trained, tmp_path, forbid_weights):
    run = copy_run(trained, tmp_path / "run")
    study._open_study(run, config(run))
    other = copy_run(run, tmp_path / "other" / "run")
    randomize_factors(other, seed=1)
    with pytest.raises(RunError, match="other super-adapter: factors"):
        search(config(other))
    text = other.config_file.read_text()
    moved = copy_run(run, tmp_path / "moved" / "run")
    moved.config_file.write_text(text.replace("validation_examples: ", "validation_examples: 1"))
    with pytest.raises(RunError, match=r"other task: task\.validation_examples"):
        search(config(moved))


def test_a_study_is_of_one_set_of_rows_wherever_they_are(trained, tmp_path, forbid_weights):
    """Also of a run that does not know what it was trained on."""
    run = copy_run(trained, tmp_path / "run")
    (tmp_path / "data").mkdir()
    task = choices_task(tmp_path / "data")
    run.move(replace(run.config(), task=task))
    study._open_study(run, config(run))[0].enqueue_trial({})
    (tmp_path / "elsewhere").mkdir()
    run.move(replace(run.config(), task=choices_task(tmp_path / "elsewhere")))
    again, _ = study._open_study(run, config(run))
    assert len(again.trials) == 1, "the same rows in another place"
    file = tmp_path / "elsewhere" / "validation.jsonl"
    file.write_text(file.read_text().replace("Tom", "Bob"))
    with pytest.raises(RunError, match=r"other data: the validation examples of .*\(30 others\)"):
        search(config(run))
    run.data.unlink()
    with pytest.raises(RunError, match="other rows: validation"):
        search(config(run))


def test_a_study_of_an_earlier_version_goes_on(trained, tmp_path):
    run = copy_run(trained, tmp_path / "run")
    settings = yaml.safe_load(run.config_file.read_text())
    settings["task"]["draw"] = "position"
    run.data.unlink()
    run.config_file.write_text(yaml.safe_dump(settings))
    opened, _ = study._open_study(run, config(run))
    kept = opened.user_attrs["task"]
    for name in ("draw", "cutoff"):
        del kept["task"][name]
    opened.set_user_attr("task", kept)
    study._open_study(run, config(run))
