"""The page of the recipes: every command in its tables is understood, and nothing is left out."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from pathlib import Path

import pytest
import yaml

from elastic.__main__ import COMMANDS
from elastic.config import TrainConfig
from elastic.config.parsing import parse
from elastic.errors import ConfigError
from tests.helpers.papers import RECIPES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "guides" / "recipes.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("|")]
TASKS = {
    task["task"]
    for file in (ROOT / "configs" / "harness").glob("*.yaml")
    for task in [yaml.load(re.sub("!function", "", file.read_text()), yaml.SafeLoader)]
}


def commands(row: str) -> list[list[str]]:
    """Words of those in a row, from the name of ours on; files of accelerate exist."""
    found = []
    for code in re.findall(r"`([^`]+)`", row):
        words = shlex.split(code)
        if words[0] == "accelerate":
            assert (ROOT / words[words.index("--config_file") + 1]).is_file()
            words = words[words.index("-m") + 1 :]
        if words[0] == "elastic":
            found.append(words[1:])
    return found


@functools.cache
def trained(row: str) -> TrainConfig:
    """What the first command of a row, which trains, is understood as."""
    name, *arguments = commands(row)[0]
    assert name == "train"
    return parse(TrainConfig, arguments)


WITH_COMMANDS = [row for row in ROWS if commands(row)]


@pytest.mark.parametrize("row", WITH_COMMANDS, ids=lambda row: " ".join(commands(row)[0][2:4]))
def test_the_commands_of_a_row_belong_together(row, tmp_path, monkeypatch):
    """What is trained is what is evaluated, by tasks that there are, with leave where code runs."""
    monkeypatch.chdir(tmp_path)
    config, (_, *more) = trained(row), commands(row)
    for name, *arguments in more:
        assert name == "evaluate"
        asked = parse(COMMANDS[name][0], arguments)
        assert asked.run == config.run
        assert set(asked.harness) <= TASKS
        assert asked.run_code == any(task.endswith("humaneval") for task in asked.harness)
        assert asked.harness or asked.tasks or asked.sub_adapter == "best"
    assert more or config.tasks  # a sequence is tested while it is trained


def test_runs_differ():
    """No two commands would train into one directory."""
    runs = [trained(row).run for row in WITH_COMMANDS]
    assert len(set(runs)) == len(runs) > 40


def test_the_page_names_every_recipe_and_every_task():
    used = {word for row in WITH_COMMANDS for words in commands(row) for word in words}
    left_out = set(RECIPES) - used
    assert left_out == {"olora-llama-7b-train"} and "`olora-llama-7b-train`" in TEXT
    assert set(re.findall(r"`(\w+)`", TEXT.partition("## The benchmarks")[2])) & TASKS == TASKS
    asked = {task for word in used for task in word.split(",")}
    assert asked >= TASKS


def test_a_command_that_is_none_is_noticed():
    row = "| Llama | `elastic train --config sorsa-lama2-7b-math-train` |"
    [(name, *arguments)] = commands(row)
    with pytest.raises(ConfigError, match="did you mean 'sorsa-llama2-7b-math-train'"):
        parse(COMMANDS[name][0], arguments)


def test_python_of_the_page_is_python():
    [block] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    ast.parse(block)
