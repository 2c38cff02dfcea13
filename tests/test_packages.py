"""What is released is whole: a wheel and an sdist that need nothing beside themselves, a base that
imports no extra, and files for Docker and for CI elsewhere that say what pyproject.toml says."""

from __future__ import annotations

import email
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import yaml

import elastic
from elastic.__main__ import main
from tests.helpers.base_only import link_base, run_in
from tests.helpers.tiny import save_tiny

ROOT = Path(elastic.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INSIDE = {
    "elastic": "elastic",
    "configs": "elastic/configs",
    "search_spaces": "elastic/search_spaces",
}
"""Where a wheel has what stands in a folder of the checkout."""


def shipped() -> set[str]:
    """All that commands read, as a wheel names it."""
    return {
        f"{inside}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in INSIDE.items()
        for pattern in ("*.py", "*.html", "*.yaml", "py.typed")
        for file in (ROOT / folder).rglob(pattern)
    }


def copied_by_docker() -> list[str]:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copies = [shlex.split(line)[1:-1] for line in lines if line.startswith("COPY ")]
    return [name for names in copies if not names[0].startswith("--") for name in names]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """Sdist, and the wheel made from it, of what the Dockerfile copies and nothing else."""
    pytest.importorskip("build", reason="pip install -e '.[dev]'")
    source, dist = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    for name in copied_by_docker():
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    [sdist], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def said(built) -> Message:
    """The wheel's metadata."""
    with zipfile.ZipFile(built[1]) as archive:
        [file] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        return email.message_from_bytes(archive.read(file))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The wheel, unpacked as installing it would."""
    place = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(place)
    return place


def elsewhere(installed: Path, folder: Path, *arguments: str) -> str:
    """What `python ARGUMENTS` prints in another folder, with the package that was installed."""
    done = subprocess.run(
        [sys.executable, "-P", *arguments], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_all_that_commands_read_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == shipped()


def test_the_sdist_has_what_the_wheel_is_made_of(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", *INSIDE} <= names | {
        name.partition("/")[0] for name in names
    }


def test_the_metadata_says_what_an_index_shows(said):
    assert said["Version"] == PROJECT["version"]
    assert said["License-Expression"] == "Apache-2.0" and said["License-File"]
    assert said["Keywords"] and said["Description-Content-Type"] == "text/markdown"
    urls = dict(line.split(", ") for line in said.get_all("Project-URL"))
    assert urls == PROJECT["urls"]
    assert f">={pythons()[0]}" == said["Requires-Python"]


def pythons() -> list[str]:
    """That the classifiers name, the oldest first."""
    found = [re.search(r"Python :: (3\.\d+)$", line) for line in PROJECT["classifiers"]]
    return sorted((match[1] for match in found if match), key=lambda one: int(one.split(".")[1]))


def test_the_installed_commands_find_recipes_and_spaces_from_any_folder(installed, tmp_path):
    """Without torch, which takes seconds."""
    code = (
        "import elastic, elastic.__main__ as command\n"
        "from elastic.config import SearchConfig, TrainConfig\n"
        "from elastic.config.parsing import parse\n"
        "from elastic.files import shipped\n"
        "assert not command.main(['--help'])\n"
        "parse(TrainConfig, ['--config', 'demo-train'])\n"
        "parse(SearchConfig, ['RUN', '--config', 'lonas-search'])\n"
        "print(elastic.__file__, shipped('search_spaces', 'llama'), elastic.__version__, sep='\\n')"
    )
    *usage, home, space, version = elsewhere(installed, tmp_path, "-c", code).splitlines()
    assert usage[0].startswith("usage: elastic COMMAND")
    assert Path(home) == installed / "elastic" / "__init__.py"
    assert Path(space) == installed / "elastic" / "search_spaces" / "llama.yaml"
    assert version == PROJECT["version"]


@pytest.mark.slow
def test_the_installed_command_shows_a_space_from_any_folder(installed, tmp_path):
    base = save_tiny(tmp_path)
    command = ("-m", "elastic", "space", "show")
    shown = elsewhere(installed, tmp_path, *command, "llama", "--model.path", str(base))
    assert "sub-adapters" in shown


def test_the_version_stands_in_one_place(capsys, installed, monkeypatch):
    monkeypatch.syspath_prepend(installed)
    assert elastic.__version__ == PROJECT["version"]
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{PROJECT['version']}\n"
    lines = [
        f"{file.name}: {line}"
        for file in ROOT.glob("elastic/**/*.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if f'"{PROJECT["version"]}"' in line
    ]
    assert not lines


def test_every_module_imports_with_the_base_alone(tmp_path):
    """All at once: torch and transformers take seconds."""
    site = tmp_path / "site"
    site.mkdir()
    link_base(PROJECT["dependencies"], site)
    (site / "elastic").symlink_to(ROOT / "elastic")
    code = (
        "import importlib, pkgutil, sys, elastic\n"
        "names = [m.name for m in pkgutil.walk_packages(elastic.__path__, 'elastic.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "hidden = sys.argv[1].split()\n"
        "print(len(names), elastic.__version__, *filter(importlib.util.find_spec, hidden))"
    )
    extras = "matplotlib plotly gguf onnx onnxruntime openvino nncf datasets pandas tensorboard"
    done = run_in(site, "-c", code, extras, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    modules, *rest = done.stdout.split()
    assert int(modules) > 100
    # Its metadata is not there, and no extra can be seen.
    assert rest == ["0+unknown"]


def test_docker_gets_what_it_copies():
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {f"!{name}" for name in copied_by_docker()} == {n for n in kept if n.startswith("!")}
    extras = re.search(r"^ARG EXTRAS=(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])


def test_the_workflow_runs_the_script_on_the_oldest_and_newest_python():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    [job] = workflow["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == [pythons()[0], pythons()[-1]]
    [script] = [step["run"] for step in job["steps"] if "run" in step]
    assert os.access(ROOT / script, os.X_OK)


def test_dev_and_the_makefile_name_every_extra():
    """But the trackers, which bring servers of their own; a test has stand-ins."""
    extras = set(PROJECT["optional-dependencies"]) - {"dev", "docs", "mlflow", "trackio", "wandb"}
    [own] = [line for line in PROJECT["optional-dependencies"]["dev"] if "[" in line.split("==")[0]]
    assert set(re.search(r"\[(.*)\]", own)[1].split(",")) == extras
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.search(r"^EXTRAS := (.*)$", makefile, re.MULTILINE)[1].split(",")) == extras
