"""A template says what its writer meant, whichever way it came here."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from elastic.config import TaskConfig, TrainConfig
from elastic.config.parsing import parse
from elastic.data.rows import example_of, template_of

README = Path(__file__).parents[2] / "README.md"
ARGUMENTS = "import json, sys; print(json.dumps(sys.argv[1:]))"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"Q: {q}\nA:", "Q: {q}\nA:"),
        (r"{q}\tA:", "{q}\tA:"),
        (r"{q}\\nA:", r"{q}\nA:"),
        (r"{q}\\\nA:", "{q}\\\nA:"),
        ("{q}\nA:", "{q}\nA:"),
        (r"C:\dir {q}", r"C:\dir {q}"),
    ],
)
def test_escapes_are_read_once_in_either_template(written, meant):
    config = TaskConfig(name="datasets", dataset="x", prompt=written, second=written, answer="a")
    example = example_of({"q": r"in a row \n stays", "a": "1"}, config, "x:1")
    assert example.prompt == example.second == meant.format(q=r"in a row \n stays")


def test_settings_that_are_saved_and_read_again_mean_the_same(tmp_path):
    prompt = r"Q: {q}\\n\n"
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"task": {"prompt": prompt}}))
    again = parse(TrainConfig, ["--config", str(file)])
    assert again.task.prompt == prompt and template_of(again.task.prompt) == "Q: {q}\\n\n"


def test_a_template_in_a_file_is_as_it_stands(tmp_path):
    (tmp_path / "mine.txt").write_text("Q: {q}\\n\nA:\n")
    assert template_of(str(tmp_path / "mine.txt")) == "Q: {q}\\n\nA:"


def test_readmes_own_command_means_what_it_shows():
    """Through a real shell, which leaves what stands in single quotes as it is."""
    text = README.read_text(encoding="utf-8")
    start = text.index("elastic train --run runs/mine --model.path")
    command = text[start : text.index("\nelastic search", start)]
    shown = shlex.quote(ARGUMENTS)
    script = f'elastic() {{ {shlex.quote(sys.executable)} -c {shown} "$@"; }}\n{command}'
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    arguments = json.loads(said.stdout)
    assert arguments[0] == "train"
    task = parse(TrainConfig, arguments[1:]).task
    example = example_of({"question": "2+2?", "answer": 4}, task, "x:1")
    assert (example.prompt, example.answer) == ("Question: 2+2?\nAnswer:", "4")
