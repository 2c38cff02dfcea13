"""Blocks by name: what a pattern says is what it finds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.errors import ConfigError
from elastic.spaces.declared import SearchSpace
from elastic.spaces.pattern import matching, pattern_of
from tests.helpers import tiny


@given(st.sets(st.integers(0, 30), min_size=1))
def test_a_pattern_finds_the_blocks_that_it_was_made_of(numbers):
    pattern = matching(pattern_of("model.layers", sorted(numbers), 31), "space")
    found = {n for n in range(40) if pattern.fullmatch(f"model.layers.{n}")}
    assert found == numbers or len(numbers) == 31


def test_neighbours_are_a_range():
    assert pattern_of("h", [0, 2, 4, 5, 6, 8, 9], 12) == "h.{0,2,4..6,8,9}"
    assert pattern_of("h", [3], 12) == "h.3" and pattern_of("h", range(12), 12) == "h.*"


@pytest.mark.parametrize("braces", ["{}", "{1", "1}", "{a}", "{2..1}", "{1..}", "{0..999999999}"])
def test_braces_without_numbers_are_refused(braces):
    value = tiny.space_dict() | {"blocks": f"model.layers.{braces}"}
    with pytest.raises(ConfigError, match="braces hold numbers of blocks"):
        SearchSpace.from_dict(value)


def test_a_space_may_name_some_blocks_of_a_list():
    value = tiny.space_dict() | {"blocks": "model.layers.{1..3}"}
    space = SearchSpace.from_dict(value)
    assert SearchSpace.from_dict(space.as_dict()) == space
    bound = space.bind(tiny.llama(num_hidden_layers=5), tiny.RANK)
    assert {int(name.split(".")[2]) for name in bound.targets} == {1, 2, 3}
    inside = "model.layers.2.self_attn.o_proj"
    assert inside in space.adapting([inside], 4).bind(tiny.llama(num_hidden_layers=5), 4).targets
    with pytest.raises(ConfigError, match="lies in no block"):
        space.adapting(["model.layers.4.self_attn.o_proj"], 4)
