"""Settings come from YAML and flags; a wrong one is refused by its name, before anything loads."""

import dataclasses
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

import elastic
from elastic.__main__ import COMMANDS, main
from elastic.adapters import METHODS
from elastic.config import (
    AdapterConfig,
    BudgetConfig,
    EvaluateConfig,
    ExportConfig,
    LatencyConfig,
    ScheduleConfig,
    SearchConfig,
    StageConfig,
    TaskConfig,
    TimingConfig,
    TrainConfig,
)
from elastic.config.latency import GRAPHS
from elastic.config.parsing import from_dict, parse
from elastic.data import TASKS
from elastic.errors import ConfigError
from elastic.exporting.targets import FORMATS
from elastic.formats.compression import MODES
from elastic.formats.graphs import MODULES, PACKAGES
from elastic.latency.weigh import LOADERS
from elastic.run import as_plain
from elastic.spaces.dims import DEPTH, DIMS
from elastic.spaces.expert_dims import EXPERT_DIMS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
"""Those of accelerate are loaded in end_to_end/test_distributed.py."""
ROOTS = {name: kind for name, (kind, *_) in COMMANDS.items()}


def recipe(tmp_path, text: str) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return str(file)


# Recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path):
    kind = ROOTS[path.stem.rpartition("-")[2]]
    by_path = parse(kind, ["--config", str(path)])
    assert parse(kind, ["--config", path.stem]) == by_path
    assert parse(kind, [f"--config={path.stem}"]) == by_path
    assert from_dict(kind, as_plain(by_path), "again") == by_path
    for key in yaml.safe_load(path.read_text()):
        assert hasattr(by_path, key)


@pytest.mark.parametrize("kind", ROOTS.values(), ids=ROOTS)
def test_defaults_are_those_of_the_dataclass(kind):
    assert parse(kind, []) == kind() == from_dict(kind, {}, "empty")


# Precedence


def test_flags_beat_yaml_beats_defaults(tmp_path):
    file = recipe(tmp_path, "adapter: {rank: 4}\nseed: 7\nlr: {base_lr: 6.0e-4}\n")
    found = parse(TrainConfig, ["--config", file, "--adapter.rank", "8", "--seed=9"])
    expected = TrainConfig(adapter=AdapterConfig(rank=8), seed=9, lr=ScheduleConfig(base_lr=6e-4))
    assert found == expected
    assert parse(TrainConfig, ["--config", file]).adapter == AdapterConfig(rank=4)


@pytest.mark.parametrize("kind", ROOTS.values(), ids=ROOTS)
def test_a_first_word_is_the_run_or_what_the_command_is_about(tmp_path, kind):
    first = dataclasses.fields(kind)[0].name
    assert first in ("run", "space", "file")
    file = recipe(tmp_path, f"{first}: runs/yaml\n")
    for words in (["runs/mine"], ["runs/mine", "--config", file],
                  ["--config", file, f"--{first}", "runs/mine"]):  # fmt: skip
        assert getattr(parse(kind, words), first) == "runs/mine"
    assert parse(SearchConfig, ["runs/mine", "--trials", "3"]).trials == 3


def test_flags_beat_yaml_wherever_they_stand(tmp_path):
    file = recipe(tmp_path, "seed: 7\nbatch_size: 3\n")
    for config in (["--config", file], [f"--config={file}"]):
        found = parse(TrainConfig, ["--seed", "9", *config])
        assert (found.seed, found.batch_size) == (9, 3)


def test_stages_from_yaml(tmp_path):
    file = recipe(
        tmp_path, "stages:\n- init_lr: 1.0e-3\n- {train_dims: [rank], epochs: 3, init_lr: 3.0e-4}\n"
    )
    found = parse(TrainConfig, ["--config", file]).stages
    assert found == [
        StageConfig(init_lr=1e-3), StageConfig(train_dims=["rank"], epochs=3, init_lr=3e-4)
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["80%", "25", "12.5 %", "0.3"])
def test_budgets_are_numbers_or_percentages(text):
    found = parse(SearchConfig, ["--budget.prefill_ms", text]).budget
    full = {"prefill_ms": 200.0}
    expected = float(text.rstrip("% ")) * (2.0 if "%" in text else 1.0)
    assert found.resolved(full) == {"prefill_ms": pytest.approx(expected)}
    assert BudgetConfig().resolved(full) == {}


@pytest.mark.parametrize(
    ("budget", "least"),
    [
        ({"max_accuracy_drop": 0.1}, 0.7),
        ({"max_accuracy_drop": "10%"}, 0.72),
        ({"max_accuracy_drop": 0.1, "min_accuracy": 0.75}, 0.75),
        ({"max_accuracy_drop": 0.01, "min_accuracy": "90%"}, 0.79),
    ],
)
def test_a_limited_drop_is_a_least_accuracy(budget, least):
    found = BudgetConfig(**budget).resolved({"min_accuracy": 0.8})
    assert found == {"min_accuracy": pytest.approx(least)}


# Faults


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (TrainConfig, ["--sede", "1"], "unknown setting 'sede'; did you mean 'seed'?"),
        (TrainConfig, ["--adapter.rnk", "1"],
         "unknown setting 'adapter.rnk'; did you mean 'adapter.rank'?"),
        (TrainConfig, ["--adaptor.rank", "1"], "did you mean 'adapter.rank'?"),
        (SearchConfig, ["--budget.prefil_ms", "1"], "did you mean 'budget.prefill_ms'?"),
        (TrainConfig, ["one", "two"], "unknown setting 'two'"),
        (TrainConfig, ["--adapter.method", "lroa"],
         "unknown adapter.method 'lroa'; did you mean 'lora'? known: auto"),
        (TrainConfig, ["--order", "activaton"], "unknown order 'activaton'; did you mean"),
        (TrainConfig, ["--task.name", "arithmetics"], "did you mean 'arithmetic'?"),
        (SearchConfig, ["--sampler", "randon"], "unknown sampler 'randon'; did you mean 'random'?"),
        (ExportConfig, ["--formats", "[peff]"], "did you mean 'peft'?"),
        (ExportConfig, ["--formats", "hf,peff"], "did you mean 'peft'?"),
        (ExportConfig, ["--formats", "[]"], "formats is empty"),
        (SearchConfig, ["--objectives", "accuracy,prefil_ms"], "did you mean 'prefill_ms'?"),
        (SearchConfig, ["--objectives", "prefill_ms"], "accuracy must be one of them"),
        (SearchConfig, ["--objectives", "accuracy,macs,macs"], "one is named twice"),
        (ExportConfig, ["--timing.runtime", "onnx"], "choose with formats"),
        (ExportConfig, ["--merge.weight", "2"],
         "merge.weight is 2.0, but there is nothing to merge; name it with merge.adapters"),
        (ExportConfig, ["--merge.strategy", "ties"], "merge.strategy is ties, but there is"),
        (ExportConfig, ["--merge.density=0.2"], "merge.density is 0.2, but there is nothing"),
        (ExportConfig, ["--merge.adapters", "[{path: x}]", "--merge.density", "0.2"],
         "merge.density is 0.2, which the strategy linear does not use"),
        (ExportConfig, ["--merge.adapters", "[{path: x}]", "--merge.strategy", "dare_linear",
                        "--merge.majority_sign_method", "frequency"],
         "leave it out, or choose merge.strategy from ties, dare_ties"),
        (ExportConfig, ["--merge.adapters", "[{path: x}]", "--formats", "peft,elastic"],
         "formats peft, elastic: what is merged has neither a low rank nor other sizes"),
        (EvaluateConfig, ["--chat"], "chat goes with harness"),
        (EvaluateConfig, ["--run_code", "--tasks", "math"], "run_code goes with harness"),
        (EvaluateConfig, ["--harness_tasks", "x"], "harness_tasks goes with harness"),
        (EvaluateConfig, ["--beams", "1"], "beams goes with tasks"),
        (EvaluateConfig, ["--tasks", "math", "--protocol", "likelihood", "--beams", "1"],
         "beams are of the published protocol"),
        (EvaluateConfig, ["--tasks", "math", "--split", "validation"], "split is of the run's own"),
        (EvaluateConfig, ["--data", "x", "--harness", "gsm8k"], "data goes with tasks"),
        (EvaluateConfig, ["--protocol", "likelihood"], "protocol goes with tasks"),
        (EvaluateConfig, ["--window", "9"], "window goes with text"),
        (EvaluateConfig, ["--text", "x", "--examples", "2"], "a text is read as a whole"),
        (SearchConfig, ["--race", "0.7"], "race is 0.7"),
        (SearchConfig, ["--table.seen", "1"], "table.seen is 1"),
        (TrainConfig, ["--seed", "1.5"], "seed"),
        (TrainConfig, ["--adapter.rank", "many"], "adapter.rank"),
        (TrainConfig, ["--adapter.rank", "0"], "adapter.rank is 0; it must be at least 1"),
        (TrainConfig, ["--adapter.dropout", "1"], "adapter.dropout is 1.0"),
        (TrainConfig, ["--adapter.alpha", "-2"], "adapter.alpha is -2.0"),
        (TrainConfig, ["--lr.base_lr", "0"], "lr.base_lr is 0.0"),
        (TrainConfig, ["--batch_size", "0"], "batch_size is 0"),
        (TrainConfig, ["--task.name", "jsonl"], "task.train"),
        (SearchConfig, ["--budget.prefill_ms", "fast"], "budget.prefill_ms is 'fast'"),
        (SearchConfig, ["--budget.macs=-80%"], "budget.macs is '-80%'"),
        (SearchConfig, ["--budget.params", "0%"], "budget.params is 0%; it must be positive"),
        (SearchConfig, ["--budget.min_accuracy", "1.5"], "budget.min_accuracy"),
        (SearchConfig, ["--budget.max_accuracy_drop", "2"], "budget.max_accuracy_drop"),
        (SearchConfig, ["--trials", "1"], "trials is 1"),
        (SearchConfig, ["--timing.rounds", "0"], "timing.rounds must be at least 1"),
        (SearchConfig, ["--timing.rounds", "30"], "timing.max_rounds is 20"),
        (TrainConfig, ["--config", "demo-trian"], "unknown config 'demo-trian'; did you mean"),
        (TrainConfig, ["--config", "none/x.yaml"], "none/x.yaml: no such file"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_named(kind, arguments, message):
    with pytest.raises(ConfigError) as caught:
        parse(kind, arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_goes_with_a_setting_is_taken_beside_it():
    merge = parse(ExportConfig, ["--merge.strategy", "ties", "--merge.density", "0.2",
                                 "--merge.adapters", "[{path: x}]"]).merge  # fmt: skip
    assert (merge.strategy, merge.density, merge.adapters[0].path) == ("ties", 0.2, "x")
    beams = parse(EvaluateConfig, ["--beams", "1", "--data", "x", "--tasks", "math"])
    assert (beams.beams, beams.data) == (1, "x")
    chat = parse(EvaluateConfig, ["--chat", "--run_code", "--harness", "gsm8k", "--examples", "2"])
    assert (chat.chat, chat.run_code, chat.examples) == (True, True, 2)
    with pytest.raises(
        ConfigError, match="run code on this machine; read them, then give run_code"
    ):
        parse(EvaluateConfig, ["--harness", "mine", "--harness_tasks", "folder"])
    assert parse(EvaluateConfig, ["--window", "9", "--text", "x"]).window == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adaptor: {rank: 3}", "did you mean 'adapter.rank'?"),
        ("adapter: {rnk: 3}", "unknown setting 'adapter.rnk'; did you mean 'adapter.rank'?"),
        ("sede: 3", "did you mean 'seed'?"),
        ("adapter: {rank: 0}", "adapter.rank is 0"),
        ("order: activaton", "unknown order 'activaton'; did you mean 'activation'?"),
        ("stages: [{train_dim: [rank]}]",
         "unknown setting 'stages.train_dim'; did you mean 'stages.train_dims'?"),
        ("stages: [{train_dims: [rnk]}]", "did you mean 'rank'?"),
        ("stages: [{train_dims: [width]}, {train_dims: [rank, width]}]", "stages[0].train_dims"),
        ("stages: [{epochs: 0}]", "at least 1 epoch, not 0"),
        ("stages: [{epochs: x}]", "epochs"),
        ("seed: [1]", "seed"),
    ],
)  # fmt: skip
def test_a_wrong_setting_in_yaml_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        parse(TrainConfig, ["--config", recipe(tmp_path, text + "\n")])
    assert message in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        from_dict(TrainConfig, yaml.safe_load(text), "there.yaml")
    assert message in str(caught.value) and str(caught.value).startswith("there.yaml: ")


@pytest.mark.parametrize("text", ["a: [\n", "- 1\n"])
def test_what_is_no_recipe_is_refused(tmp_path, text):
    with pytest.raises(ConfigError):
        parse(TrainConfig, ["--config", recipe(tmp_path, text)])


# Registries


def literal(kind: type, field: str) -> set[str]:
    hint = typing.get_type_hints(kind)[field]
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
    return set(typing.get_args(hint))


def test_literals_equal_registries():
    assert literal(AdapterConfig, "method") == {"auto", *METHODS}
    assert literal(TaskConfig, "name") == set(TASKS)
    dims = {*DIMS, *EXPERT_DIMS, DEPTH}
    assert literal(StageConfig, "train_dims") == dims == set(TrainConfig().progressivity)
    assert literal(TrainConfig, "progressivity") == dims
    assert literal(ExportConfig, "formats") == {
        *ExportConfig().formats, "gguf", "nemotron_nas", "elastic"
    }  # fmt: skip
    assert literal(ExportConfig, "compress") == set(MODES)
    assert set(GRAPHS) == set(MODULES) == set(PACKAGES)
    assert literal(TimingConfig, "runtime") == {"torch", *GRAPHS}
    assert {kind.runtime for kind in FORMATS.values()} - {None} == set(LOADERS)
    by_rounding = {
        name for name, mode in MODES.items()
        if not mode.calibrated and set(mode.formats) == set(GRAPHS)
    }  # fmt: skip
    assert literal(SearchConfig, "compress") == by_rounding
    assert literal(LatencyConfig, "compress") == {"chosen", "none", *by_rounding}
    assert set(FORMATS) == set(
        ExportConfig(formats=list(literal(ExportConfig, "formats")), compress=list(MODES)).kinds
    )


def test_public_names_are_where_they_are_said_to_be():
    for name in elastic.__all__:
        assert getattr(elastic, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = elastic.trian


# Commands


def test_help_waits_for_no_heavy_library():
    code = (
        "import sys\n"
        "from elastic.__main__ import main\n"
        "try: main([sys.argv[1], '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'optuna', 'numpy', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "--adapter.rank" in done.stdout and "Inner size of the maximal" in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["search", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_may_stop_before_the_end(arguments, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "elastic", *arguments], stdout=writing, stderr=subprocess.PIPE,
        check=False, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writing)
    assert done.stderr == b"" and done.returncode in (0, 1)


def test_usage_and_unknown_commands(capsys):
    assert main([]) == 0
    usage = capsys.readouterr().out
    assert all(f"  {name} " in usage for name in COMMANDS)
    assert main(["trian"]) == 1
    assert "unknown command 'trian'; did you mean 'train'?" in capsys.readouterr().err
    assert main(["train", "--sede", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: unknown setting 'sede'") and not captured.out


# Spellings


def test_timing_of_latency_starts_with_more_rounds():
    assert LatencyConfig().timing == TimingConfig(rounds=10)


@pytest.mark.parametrize("spelled", [["--formats", "hf,onnx"], ["--formats=hf,onnx"]])
def test_names_with_commas_are_a_list(spelled):
    assert parse(ExportConfig, ["run", *spelled]).formats == ["hf", "onnx"]
    assert parse(ExportConfig, ["run", "--formats", "onnx"]).formats == ["onnx"]


def test_a_switch_alone_is_on():
    assert parse(TrainConfig, ["--dry_run"]).dry_run is True
    assert parse(TrainConfig, ["runs/x", "--dry_run", "--seed", "3"]).seed == 3
    assert parse(TrainConfig, ["--dry_run", "false"]).dry_run is False
    assert parse(TrainConfig, ["--adapter.soslora.fixed_scales"]).adapter.soslora.fixed_scales
    with pytest.raises(ConfigError, match="expected one argument"):
        parse(TrainConfig, ["--seed"])


@pytest.mark.parametrize(
    "spelled", ["--from RUN --sub_adapter best", "--sub_adapter=best --from=RUN"]
)
def test_from_is_the_settings_of_a_run_and_a_directory_beside_it(tmp_path, spelled):
    run = tmp_path / "first"
    run.mkdir()
    (run / "config.yaml").write_text(f"run: {run}\nbatch_size: 3\n")
    found = parse(TrainConfig, spelled.replace("RUN", str(run)).split())
    assert (found.start_from, found.sub_adapter, found.batch_size) == (str(run), "best", 3)
    assert found.run == f"{run}-best"
    assert parse(TrainConfig, [f"--from={run}", "--run=elsewhere"]).run == "elsewhere"


def test_only_training_continues_a_run():
    with pytest.raises(ConfigError, match="unknown setting 'from'"):
        parse(SearchConfig, ["--from", "runs/first"])
