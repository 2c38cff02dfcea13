"""A saved latency table serves a search of what it was measured on, and of nothing else. Latency is
a function of the size here."""

import json
from dataclasses import replace

import pytest

from elastic.config import LatencyConfig, TableConfig, TimingConfig
from elastic.errors import ConfigError, RunError
from elastic.latency.command import time_run
from elastic.latency.latency_table import Timetable
from elastic.searching.study import search
from tests.helpers.searches import config
from tests.helpers.tiny_runs import ONE_ROUND, copy_run

pytestmark = pytest.mark.usefixtures("fake_latency")


@pytest.fixture
def table_file(trained, tmp_path, nothing_known):
    file = tmp_path / "table.json"
    timing = replace(ONE_ROUND, rounds=2, max_rounds=2)
    report = time_run(LatencyConfig(run=str(trained.path), save=str(file), timing=timing))
    assert report.file == file
    value = json.loads(file.read_text())
    for row in value["seen"] + value["unseen"]:
        row["prefill_ms"] *= 2  # or nothing would tell it from one measured here
    file.write_text(json.dumps(value))
    return file


def changed(file, **target):
    value = json.loads(file.read_text())
    value["target"] |= target
    file.write_text(json.dumps(value))


def test_a_saved_table_serves_a_search(trained, tmp_path, table_file, counted):
    run = copy_run(trained, tmp_path / "run")
    front = search(config(run, trials=4, table=TableConfig(file=[str(table_file)])))
    saved = Timetable.from_dict(json.loads(table_file.read_text()), front.timetables[None].space)
    for one in front.trials:
        assert one.figures.prefill_ms == saved(one.sub_adapter)["prefill_ms"]
    assert len(counted) <= len(front.members)  # only they were timed


def test_a_table_of_another_device_is_used_only_when_named(
    trained, tmp_path, table_file, counted, capsys
):  # fmt: skip
    changed(table_file, device="a phone")
    run = copy_run(trained, tmp_path / "run")
    with pytest.raises(
        RunError, match=r"recorded on 'a phone', this is .*--table\.target 'a phone'"
    ):
        search(config(run, table=TableConfig(file=[str(table_file)])))
    counted.clear()
    table = TableConfig(file=[str(table_file)], target="a phone")
    front = search(config(run, trials=4, table=table))
    assert not counted and all(member.measured is None for member in front.members)
    front.show()
    assert "Not measured: this is not a phone" in capsys.readouterr().out
    with pytest.raises(RunError, match="recorded on 'a phone', this is 'a watch'"):
        search(config(run, table=replace(table, target="a watch")))


@pytest.mark.parametrize(
    "target, timing, expected",
    [
        ({"model": "0" * 64}, {}, "another model or search space"),
        ({}, {"batch": 3}, r"timing\.batch 1, this is 3"),
        ({}, {"prompt_tokens": 9}, r"timing\.prompt_tokens 4, this is 9"),
        ({}, {"runtime": "onnx"}, r"timing\.runtime torch, this is onnx"),
        ({"dtype": "bfloat16"}, {}, r"model\.dtype bfloat16, this is float32"),
    ],
)
def test_a_table_of_something_else_is_refused_before_weights(
    trained, tmp_path, table_file, forbid_weights, target, timing, expected
):  # fmt: skip
    changed(table_file, **target)
    run = copy_run(trained, tmp_path / "run")
    table = TableConfig(file=[str(table_file)])
    with pytest.raises(RunError, match=expected):
        search(config(run, table=table, timing=replace(ONE_ROUND, **timing)))
    assert not run.search.exists()


@pytest.mark.parametrize("change", [{"target": 3}, {"target": {}}, {"seen": None}])
def test_a_file_that_is_no_table_is_refused(trained, tmp_path, table_file, forbid_weights, change):
    value = json.loads(table_file.read_text()) | change
    kept = {name: part for name, part in value.items() if part is not None}
    table_file.write_text(json.dumps(kept))
    table = TableConfig(file=[str(table_file)])
    with pytest.raises(RunError, match="holds no latency table; record one with"):
        search(config(copy_run(trained, tmp_path / "run"), table=table))


def test_a_study_keeps_its_table(trained, tmp_path, table_file):
    run = copy_run(trained, tmp_path / "run")
    search(config(run, trials=2, starts=2, table=TableConfig(file=[str(table_file)])))
    front = search(config(run, trials=3, starts=2))  # it need not be named again
    seen = [each.as_dict() for each in front.timetables[None].seen]
    assert seen == json.loads(table_file.read_text())["seen"]
    value = json.loads(table_file.read_text())
    value["seen"][1]["prefill_ms"] *= 2
    table_file.write_text(json.dumps(value))
    with pytest.raises(RunError, match="not the latency table that this study was begun with"):
        search(config(run, starts=2, table=TableConfig(file=[str(table_file)])))


def test_settings_of_tables_are_checked(trained):
    with pytest.raises(ConfigError, match=r"table\.target"):
        TableConfig(target="a phone")
    with pytest.raises(ConfigError, match=r"timing\.merged false"):
        TimingConfig(merged=False, runtime="onnx")
    with pytest.raises(ConfigError, match="read by `elastic search`"):
        time_run(LatencyConfig(run=str(trained.path), table=TableConfig(file=["x.json"])))
