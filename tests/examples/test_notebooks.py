"""Every notebook runs from top to bottom and shows what it says. Here in this process, which has
imported what they need; with -m slow as Jupyter runs them."""

import json
import tempfile
from pathlib import Path

import pytest

import elastic
from elastic.adapters import METHODS

EXAMPLES = Path(elastic.__file__).parents[1] / "examples"
CHECKS = {
    "your-data-from-csv": lambda known: known["right"] > 180,
    "a-new-adapter-method": lambda known: (known["inside"] - known["outside"]).abs().max() < 1e-3,
    "own-loop-and-trl": lambda known: known["net"].supernet.current == known["net"].space.maximal(),
    "merging-two-tasks": lambda known: known["share"](known["model"], "Subject") > 0,
    "choosing-from-a-front": lambda known: known["enough"] in known["front"].members,
}


def read(name: str) -> dict:
    return json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))


def test_every_notebook_is_known():
    assert {file.stem for file in EXAMPLES.glob("*.ipynb")} == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_notebook_says_what_it_shows_and_what_came_of_it(name):
    first, *cells = read(name)["cells"]
    text = "".join(first["source"])
    assert text.startswith("# ") and "**What this shows:**" in text
    assert "**How long it takes:** about " in text
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert {output["name"] for output in outputs} == {"stdout"}, "run, and nothing but text kept"
    assert (EXAMPLES / f"{name}.ipynb").stat().st_size < 20_000
    assert "tests" not in "".join("".join(cell["source"]) for cell in cells)
    assert tempfile.gettempdir() + "/" not in json.dumps(outputs), "places of one machine"


@pytest.mark.parametrize("name", CHECKS)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    methods, known = dict(METHODS), {"__name__": name}
    try:
        for number, cell in enumerate(read(name)["cells"]):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{name}: cell {number}", "exec"), known)
        assert CHECKS[name](known)
    finally:
        METHODS.clear()
        METHODS.update(methods)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_a_notebook_runs_in_a_kernel_of_its_own(name):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    where = {"metadata": {"path": str(EXAMPLES)}}
    nbclient.NotebookClient(book, timeout=600, resources=where).execute()
