"""Whatever a configuration holds, it is read or refused in one line, and nothing in it is run."""

import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from elastic.__main__ import COMMANDS
from elastic.config.parsing import _dotted, _groups, from_dict, parse
from elastic.run import as_plain
from elastic.spaces.declared import SearchSpace
from tests.helpers.fuzzing import STRANGE, canary, damaged, fuzzed, mutated, works_or_is_refused
from tests.helpers.tiny import RANK, llama, space_dict

ROOT = Path(__file__).parents[2]
KINDS = {name: kind for name, (kind, *_) in COMMANDS.items()}
MODEL = llama()
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def never_imported(tmp_path_factory):
    with canary(tmp_path_factory.mktemp("canary")):
        yield


def known(kind: type) -> dict:
    """All settings with their defaults, and one of everything that there may be a list of."""
    value = as_plain(kind())
    if "stages" in value:
        value["stages"] = [{"train_dims": ["rank"], "epochs": 1}]
    if "merge" in value:
        value["merge"]["adapters"] = [{"path": "a", "weight": 0.5}]
    return value


@fuzzed
@given(data=st.data())
def test_a_configuration_is_read_or_refused(data):
    kind = KINDS[data.draw(st.sampled_from(list(KINDS)))]
    value = data.draw(mutated(st.just(known(kind))))
    works_or_is_refused(from_dict, kind, value, "a file")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(value), errors="surrogatepass")
        works_or_is_refused(parse, kind, ["--config", str(file)])


@fuzzed
@given(data=st.data())
def test_the_bytes_of_a_recipe_are_read_or_refused(data):
    recipe = data.draw(st.sampled_from(RECIPES))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_bytes(data.draw(damaged(recipe.read_bytes())))
        kind = KINDS[recipe.stem.rpartition("-")[2]]
        works_or_is_refused(parse, kind, ["--config", str(file)])


@fuzzed
@given(data=st.data())
def test_flags_are_read_or_refused(data):
    kind = KINDS[data.draw(st.sampled_from(list(KINDS)))]
    names = sorted({*_dotted(kind), *(name for name, _ in _groups(kind))})
    flags = [
        f"--{data.draw(st.sampled_from(names))}{data.draw(st.sampled_from(ENDINGS))}={value}"
        for value in data.draw(st.lists(st.sampled_from(STRANGE), min_size=1, max_size=2))
    ]
    works_or_is_refused(parse, kind, flags)


ENDINGS = ["", "", "", "+", ".class_path", ".init_args", ".help", ".x"]


@fuzzed
@given(value=mutated(st.just(space_dict(heads=True))))
def test_a_space_is_read_and_bound_or_refused(value):
    if space := works_or_is_refused(SearchSpace.from_dict, value):
        works_or_is_refused(space.bind, MODEL, RANK)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "space.yaml"
        file.write_text(yaml.safe_dump(value), errors="surrogatepass")
        works_or_is_refused(SearchSpace.load, str(file))
