"""Settings are plain data wherever they come from: nothing in them is looked up as code, and every
value is one that the setting can have."""

import sys
from dataclasses import replace

import pytest
import yaml

from elastic.config import BudgetConfig, ExportConfig, ModelConfig, SearchConfig, TrainConfig
from elastic.config.parsing import from_dict, parse
from elastic.errors import ConfigError, RunError
from elastic.run import Run

STRANGER = "strangers_module"


@pytest.fixture
def never_imported(tmp_path, monkeypatch):
    """A module that can be imported, and must not be."""
    (tmp_path / f"{STRANGER}.py").write_text("class Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield f"{STRANGER}.Evil"
    assert STRANGER not in sys.modules


CLASS = "class_path"
PLACES = [
    {"model": {CLASS: "PATH"}},
    {"model": "PATH"},
    {"model.class_path": "PATH"},
    {"model": {"device": {CLASS: "PATH"}}},
    {"model": {CLASS: "PATH", "init_args": {}}},
    {"stages": [{CLASS: "PATH"}]},
    {"stages": ["PATH"]},
    {"stages": {CLASS: "PATH"}},
    {"adapter": {"sorsa": {CLASS: "PATH"}}},
    {"seed": {CLASS: "PATH"}},
    {CLASS: "PATH"},
]


def named(value, path: str):
    return yaml.safe_load(yaml.safe_dump(value).replace("PATH", path))


@pytest.mark.parametrize("value", PLACES, ids=str)
def test_no_file_names_a_class(tmp_path, never_imported, value):
    value = named(value, never_imported)
    with pytest.raises(ConfigError):
        from_dict(TrainConfig, value, "a file")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(value))
    with pytest.raises(ConfigError):
        parse(TrainConfig, ["--config", str(tmp_path / "config.yaml")])
    with pytest.raises(ConfigError):  # of somebody else's run
        Run(tmp_path).begun()
    with pytest.raises(ConfigError):
        parse(TrainConfig, ["--from", str(tmp_path)])


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "PATH"],
        ["--model=PATH"],
        ["--model", '{"class_path": "PATH"}'],
        ["--model.class_path", "PATH"],
        ["--model.help", "PATH"],
        ["--stages", "[{class_path: PATH}]"],
        ["--stages", "[PATH]"],
        ["--stages+", "{class_path: PATH}"],
        ["--stages+=PATH"],
        ["--stages.class_path", "PATH"],
        ["--stages+.class_path", "PATH"],
        ["--stages.help", "PATH"],
        ["--adapter.sorsa", "PATH"],
        ["--adapte", "PATH"],
    ],
    ids=" ".join,
)
def test_no_flag_names_a_class(never_imported, flags):
    with pytest.raises(ConfigError):
        parse(TrainConfig, [flag.replace("PATH", never_imported) for flag in flags])


def test_no_flag_reads_a_file_beside_recipes(tmp_path):
    (tmp_path / "a.yaml").write_text("{rank: 4, path: x}")
    for flag in ("--adapter", "--model", "--conf"):
        with pytest.raises(ConfigError):
            parse(TrainConfig, [flag, str(tmp_path / "a.yaml")])


def test_the_code_of_a_base_is_run_where_somebody_here_allowed_it(tmp_path, monkeypatch):
    """Not because the settings of somebody else's run say so."""
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    run = Run(tmp_path / "run")
    run.super_adapter.mkdir(parents=True)
    model = ModelConfig(path=str(tmp_path), trust_remote_code=True)
    mine = TrainConfig(run=str(run.path), model=model)
    run.begin(mine)
    with pytest.raises(RunError, match="which was not allowed on this machine; read that code"):
        run.config()
    assert run.claim(mine)  # `elastic train` with the same settings
    assert run.config() == mine
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    theirs = Run(tmp_path / "theirs")
    theirs.super_adapter.mkdir(parents=True)
    theirs.begin(TrainConfig(model=replace(model, path=str(elsewhere))))
    with pytest.raises(RunError, match="not allowed"):
        theirs.config()


def test_groups_are_given_as_mappings():
    assert parse(TrainConfig, ["--adapter", "{rank: 4}"]).adapter.rank == 4
    assert parse(TrainConfig, ["--stages+", "{epochs: 2}"]).stages[0].epochs == 2
    assert from_dict(TrainConfig, {"model.path": "x"}, "a file").model.path == "x"
    merged = parse(ExportConfig, ["--merge.adapters", "[{path: a}]"]).merge.adapters
    assert [adapter.path for adapter in merged] == ["a"]


@pytest.mark.parametrize("value", [64, None, True, [1], "x.yaml", 1.5])
def test_a_group_is_a_mapping(value):
    with pytest.raises(ConfigError, match="adapter is"):
        from_dict(TrainConfig, {"adapter": value}, "a file")


@pytest.mark.parametrize(
    "name", ["run", "seed", "sampling", "order", "space", "batch_size", "stages", "tasks", "model"]
)
def test_null_is_for_settings_that_may_be_unset(name):
    with pytest.raises(ConfigError, match=f"a file: {name} is null"):
        from_dict(TrainConfig, {name: None}, "a file")
    assert from_dict(TrainConfig, {"max_steps": None}, "a file") == TrainConfig()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 10**20}, "seed"),
        ({"adapter": {"alpha": float("inf")}}, "adapter.alpha"),
        ({"adapter": {"lr_ratio": float("inf")}}, "adapter.lr_ratio"),
        ({"lr": {"base_lr": float("inf")}}, "lr.base_lr"),
        ({"lr": {"base_lr": 10**400}}, "lr.base_lr"),
        ({"lr": {"warmup_epochs": float("inf")}}, "lr.warmup_epochs"),
        ({"stages": [{"init_lr": float("inf")}]}, "init_lr"),
        ({"sequence": {"lambda_1": [float("nan")]}, "tasks": ["a"]}, "sequence.lambda_1"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"task": {"prompt": {"a": "b"}}}, "task.prompt"),
    ],
)
def test_numbers_that_nothing_could_come_of_are_refused(settings, name):
    with pytest.raises(ConfigError, match=name) as caught:
        from_dict(TrainConfig, settings, "a file")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["inf", float("inf"), "1e400", "9" * 400 + "%", float("nan"), 0])
@pytest.mark.parametrize("name", ["prefill_ms", "params", "min_accuracy"])
def test_a_budget_is_finite_and_positive(name, value):
    with pytest.raises(ConfigError, match=f"budget.{name}"):
        BudgetConfig(**{name: value})


@pytest.mark.parametrize("name", ["min_accuracy", "max_accuracy_drop"])
@pytest.mark.parametrize("value", ["500%", 5, 5.0, "5", "100.1%"])
def test_an_accuracy_is_at_most_all(name, value):
    with pytest.raises(ConfigError, match=f"budget.{name}"):
        BudgetConfig(**{name: value})
    assert parse(SearchConfig, [f"--budget.{name}", "100%"]).budget.limits() == {name: "100%"}
