"""The public names: cheap to import, known to type checkers, and the example of the docstring."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

import elastic
from tests.helpers import tiny


def test_importing_costs_nothing():
    code = "import elastic, sys; assert not {'torch', 'transformers', 'optuna'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_checkers_know_every_name():
    tree = ast.parse(Path(elastic.__file__).read_text(encoding="utf-8"))
    [block] = (node for node in tree.body if isinstance(node, ast.If))
    typed = {a.name: node.module for node in block.body for a in node.names}
    assert typed == {name: f"elastic.{place}" for name, place in elastic._WHERE.items()}
    assert elastic.__all__ == sorted(typed) == dir(elastic)


def test_the_example_of_the_docstring_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, example = elastic.__doc__.split("in memory:\n\n")
    rows = [{"prompt": f"{a}+1=", "answer": a + 1} for a in range(9)]
    model = tiny.llama(dtype=torch.float32, intermediate_size=256)
    known = dict(elastic=elastic, model=model, tokenizer=tiny.tokenizer(), rows=rows,
                 my_score=lambda model: 1.0)  # fmt: skip
    exec(textwrap.dedent(example.partition("\n\nNames")[0]), known)
    assert (tmp_path / "small" / "config.json").is_file()
    assert known["front"].best.params < known["front"].full.params
