"""What a run directory says is believed as far as it has its shape, and leads nowhere else."""

import json

import pytest

from elastic.config import ExportConfig, TrainConfig
from elastic.config.parsing import parse
from elastic.errors import ConfigError, RunError
from elastic.run import Run
from elastic.spaces.bound import SubAdapter
from elastic.training.callbacks import MetricsFile

SUB = SubAdapter((("g", 4),))
SCORED = {
    "accuracy": 0.5, "accuracy_n": 8, "accuracy_interval": [0.2, 0.8], "held_out_loss": 1.5,
    "compensation": {"degree": 0.0},
}  # fmt: skip
RECOVERY = {
    "steps": 4, "folder": "abc", "taken": True, "before": SCORED, "after": SCORED,
    "maximal": {"before": SCORED, "after": SCORED},
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.super_adapter.mkdir(parents=True)
    run.sub_adapters.mkdir(parents=True)
    run.begin(TrainConfig(run=str(run.path)))
    return run


def written(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))
    return file


def test_no_name_of_a_sub_adapter_leads_out_of_the_run(run):
    written(run.search / "outside.json", SUB.as_dict())
    with pytest.raises(RunError, match="unknown sub-adapter"):
        run.chosen("../outside")
    for name in ("a\nb", ".hidden", "..", "x\x7f"):
        file = written(run.path / f"{name}.json", SUB.as_dict())
        with pytest.raises(RunError, match="its name is given to folders"):
            run.chosen(str(file))
        with pytest.raises(ConfigError, match="a directory of this name"):
            ExportConfig(name=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "../../other"}, "recovery: folder is"),
        ({"folder": 5}, "recovery: folder: expected text"),
        ({"taken": "yes"}, "recovery: taken: expected true or false"),
        ({"before": {}}, "recovery: before: accuracy is missing"),
        ({"maximal": None}, "recovery: maximal: expected a mapping"),
    ],
)
def test_what_is_said_of_recovery_has_its_shape(run, change, message):
    value = {**SUB.as_dict(), "recovery": RECOVERY}
    file = written(run.sub_adapters / "best.json", {"sub_adapter": SUB.as_dict(), **value})
    chosen = run.chosen("best")
    assert run.factors_of(chosen) == run.recovered / "abc" / "super_adapter"
    changed = {"sub_adapter": SUB.as_dict(), "recovery": {**RECOVERY, **change}}
    written(file, changed)
    with pytest.raises(RunError, match=message):
        run.chosen("best")


@pytest.mark.parametrize("value", [None, 5, [], {}, {"formats": []}])
def test_a_report_of_another_shape_is_named(run, value):
    written(run.path / "export" / "best" / "report.json", value)
    with pytest.raises(RunError, match=r"report\.json"):
        run.export("best", SUB, ["hf"])


@pytest.mark.parametrize("budget", [None, [], {"x": 1}, {"prefill_ms": [1]}, {"params": "much"}])
def test_a_budget_of_another_shape_is_named(run, budget):
    written(run.search / "about.json", {"settings": {"budget": budget}})
    with pytest.raises((RunError, ConfigError), match=r"about\.json"):
        run.origin()


@pytest.mark.parametrize("line", ["[1]", '{"step": "x"}', "{", "[" * 5000, '{"loss": 1}'])
def test_metrics_of_another_shape_are_named(run, line):
    run.metrics.parent.mkdir()
    run.metrics.write_text(f"{line}\n")
    state = type("State", (), {"is_world_process_zero": True, "global_step": 4})
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        MetricsFile(run.metrics).on_train_begin(None, state, None)


def test_a_path_that_is_no_utf_8_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="is not UTF-8; rename what it names") as caught:
        parse(TrainConfig, [b"runs/caf\xe9".decode(errors="surrogateescape")])
    str(caught.value).encode()
