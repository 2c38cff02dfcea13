"""The pages and docstrings that say where things are: what they name exists."""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from pathlib import Path

import pytest
from transformers import Trainer

import elastic
import elastic.errors

ROOT = Path(elastic.__file__).parents[1]
PAGES = ("docs/architecture.md", "CONTRIBUTING.md", "README.md")
PACKAGES = sorted(file.parent.name for file in ROOT.glob("elastic/*/__init__.py"))
FOLDERS = "elastic|tests|docs|fragments|configs|search_spaces"


def spoken(file: Path) -> str:
    """What a file says to people: of Python its docstrings and comments (and what follows
    a # in a text of the program), of settings comments."""
    text = file.read_text(encoding="utf-8")
    if file.suffix in (".toml", ".yaml") or file.name == "Makefile":
        return "\n".join(re.findall(r"#.*", text))
    if file.suffix != ".py":
        return text
    words = [
        node.value.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    return "\n".join([*words, *re.findall(r"#.*", text)])


@functools.cache
def defines(file: Path, name: str) -> bool:
    """Whether the file has a function, class, attribute or constant of this name."""
    pattern = rf'^ *(def|class) {name}\b|^ *{name}\b.*=|import .*\b{name}\b|^ *"{name}"'
    return re.search(pattern, file.read_text(encoding="utf-8"), re.MULTILINE) is not None


def untrue(text: str) -> list[str]:
    """Paths, `path:name` and dotted modules in a text that name nothing."""
    wrong = []
    for path, name in re.findall(rf"(?<![\w/.])((?:{FOLDERS})/[\w./-]*\w)(?::(\w+))?", text):
        file = ROOT / path
        if not file.exists() or (name and not defines(file, name)):
            wrong.append(f"{path}:{name}" if name else path)
    for module in re.findall(r"(?<![\w/.])(?:elastic|tests)(?:\.[A-Za-z_]\w*)+", text):
        if not leads_somewhere(module.split(".")):
            wrong.append(module)
    return wrong


def leads_somewhere(parts: list[str]) -> bool:
    """Whether these are a package, a module, or a name in one."""
    place = ROOT
    for number, part in enumerate(parts):
        if (place / part).is_dir():
            place /= part
            continue
        module = place / f"{part}.py"
        if not module.is_file():
            return defines(place / "__init__.py", part)
        rest = parts[number + 1 :]
        return not rest or defines(module, rest[0])
    return True


def readable() -> list[str]:
    files = [*ROOT.glob("elastic/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("*.py")]
    files += [*ROOT.glob("fragments/*.py"), *ROOT.glob("docs/**/*.md")]
    files += [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("search_spaces/*.yaml")]
    named = (*PAGES, "CHANGELOG.md", "Makefile", "pyproject.toml", ".pre-commit-config.yaml")
    return [*named, *sorted(str(file.relative_to(ROOT)) for file in files)]


def test_what_is_named_exists():
    wrong = {file: untrue(spoken(ROOT / file)) for file in readable()}
    assert {file: names for file, names in wrong.items() if names} == {}


@pytest.mark.parametrize("name", [
    "elastic/trian.py", "elastic/run.py:Runner", "elastic.trian", "elastic.run.Runner",
    "elastic.run.trian", "tests.benchmarks.trian", "docs/trian.md",
])  # fmt: skip
def test_what_does_not_exist_is_noticed(name):
    assert untrue(f"see `{name}`, please") == [name]


def test_tests_that_the_pages_name_exist():
    tests = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("tests/**/test_*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", (ROOT / page).read_text(encoding="utf-8")):
            assert f"def {name}(" in tests, (page, name)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_what_it_owns(package):
    assert f"`elastic/{package}/`" in (ROOT / PAGES[0]).read_text(encoding="utf-8")
    body = ast.parse((ROOT / "elastic" / package / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(body)
    # Importing a package must not import its rooms, except where it is a registry.
    assert len(body.body) == 1 or package in ("adapters", "config", "data", "formats")


def test_the_page_draws_the_imports_that_lint_enforces():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [contract, *_] = settings["tool"]["importlinter"]["contracts"]
    drawing = (ROOT / PAGES[0]).read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    drawn = re.findall(r"^(\w+(?: \| \w+)*)", drawing, re.MULTILINE)
    assert drawn == contract["layers"]
    assert set(PACKAGES) <= {name for layer in drawn for name in layer.split(" | ")}


def private_names() -> set[tuple[str, str]]:
    """(file, name) of what belongs to another library and begins with an underscore: attributes
    that nothing here defines, modules, and methods of the Trainer that ours overrides."""
    trees = {str(file.relative_to(ROOT)): ast.parse(file.read_text(encoding="utf-8"))
             for file in ROOT.glob("elastic/**/*.py")}  # fmt: skip
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    ours = {node.name for _, node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    ours |= {node.id for _, node in nodes
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}  # fmt: skip
    ours |= {node.attr for _, node in nodes
             if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
             and ast.unparse(node.value) == "self"}  # fmt: skip
    found = set()
    for file, node in nodes:
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            if node.attr not in ours and ast.unparse(node.value) != "self":
                found.add((file, node.attr))
        elif isinstance(node, ast.ImportFrom) and re.search(r"(^|\.)_[^_]", node.module or ""):
            found.add((file, node.module))
        elif isinstance(node, ast.ClassDef) and "Trainer" in map(ast.unparse, node.bases):
            overridden = {method.name for method in node.body if hasattr(method, "name")}
            found |= {(file, name) for name in overridden & set(dir(Trainer))
                      if re.match("_[^_]", name)}  # fmt: skip
    return found


def test_private_names_of_other_libraries_are_listed():
    """All of them, each with the file that it stands in, and nothing that is gone."""
    section = (ROOT / PAGES[0]).read_text(encoding="utf-8").partition("## Private names")[2]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")][2:]
    used = private_names()
    for file, name in used:
        row = next((cells for cells in rows if file in cells[2] and said(name, cells[1])), None)
        assert row, f"{file} uses {name}, which docs/architecture.md does not list"
    for cells in rows:
        for file in re.findall(r"`([^`]*)`", cells[2]):
            assert any(where == file and said(name, cells[1]) for where, name in used), cells


def said(name: str, cell: str) -> bool:
    """Whether a cell names it, or with "and kin" one that begins alike."""
    names = re.findall(r"[\w.]*_\w[\w.]*", cell)
    kin = "and kin" in cell
    return any(name in one.split(".") or name == one or one.startswith(f"{name}.")
               or (kin and name.startswith(one.rpartition(".")[2])) for one in names)  # fmt: skip


def raised_by(function: ast.FunctionDef) -> set[str]:
    """Names of this package's errors that the function's own lines raise."""
    found: set[str] = set()
    rest: list[ast.AST] = [*function.body]
    while rest:
        node = rest.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found.add(ast.unparse(node.exc.func))
        rest.extend(ast.iter_child_nodes(node))
    return found & {name for name, one in vars(elastic.errors).items() if isinstance(one, type)}


def silent(body: list[ast.stmt], where: str) -> list[str]:
    """Public functions and methods whose docstring does not name an error that they raise."""
    wrong = []
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        name = f"{where}.{node.name}"
        if isinstance(node, ast.ClassDef):
            wrong += silent(node.body, name)
        elif documented := ast.get_docstring(node):
            wrong += [f"{name}: {e}" for e in sorted(raised_by(node)) if e not in documented]
    return wrong


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_docstrings_name_the_errors_that_are_raised(package):
    files = sorted((ROOT / "elastic" / package).glob("*.py"))
    assert files
    assert not [
        line
        for file in files
        for line in silent(ast.parse(file.read_text(encoding="utf-8")).body, file.stem)
    ]
