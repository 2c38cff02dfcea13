"""A template says what its writer meant, whichever way it came here."""

import pytest
import yaml

from elastic.config import TaskConfig, TrainConfig
from elastic.config.parsing import parse
from elastic.data.rows import example_of, template_of


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
