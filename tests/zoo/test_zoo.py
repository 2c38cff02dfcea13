"""Every family of the installed transformers does what `outcomes.json` says of it.

A quarter of them with every change, all by hand: `pytest -m slow tests/zoo`. A change that is meant
is written by `python -m tests.zoo`.
"""

import gc

import pytest

from fragments import zoo
from tests.zoo import outcomes
from tests.zoo.graphs import judge_graph
from tests.zoo.judging import NOT_BUILT, REFUSED, RIGHT, WRONG, Outcome, families, judge
from tests.zoo.outcomes import difference, in_ci, name_of

EXPECTED = outcomes.read()
pytestmark = pytest.mark.skipif(not EXPECTED, reason="seen with another release of transformers")


@pytest.fixture(scope="module", autouse=True)
def few_collections():
    """Whole collections look through all modules every time, seconds in all."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def as_it_was(family) -> None:
    changed = difference(EXPECTED.get(name_of(family)), judge(*family))
    assert changed is None, changed


@pytest.mark.parametrize("family", list(filter(in_ci, families())), ids=name_of)
def test_a_quarter_of_the_families_are_as_they_were(family):
    as_it_was(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", families(), ids=name_of)
def test_a_family_is_as_it_was(family):
    as_it_was(family)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, one in EXPECTED.items() if one.what == RIGHT])
def test_a_family_as_a_graph_is_as_it_was(name):
    assert judge_graph(*name.split(", ")) == EXPECTED[name].onnx


def test_every_family_is_expected_to_be_something():
    """And none to be wrong."""
    assert EXPECTED.keys() == {name_of(family) for family in families()}
    assert {one.what for one in EXPECTED.values()} == {RIGHT, REFUSED, NOT_BUILT}
    assert not [name for name, one in EXPECTED.items() if one.onnx.startswith(WRONG)]


def test_the_page_has_every_family():
    """In the table of what came of it; of a graph that there is not, the reason."""
    page = zoo.pages()
    tables = {RIGHT: "right.md", REFUSED: "refused.md", NOT_BUILT: "not-built.md"}
    for name, one in EXPECTED.items():
        kind = name.partition(", ")[0]
        assert f"`{kind}`" in page[tables[one.what]]
        assert one.what != RIGHT or one.onnx == RIGHT or f"`{kind}`" in page["no-graph.md"]
    assert f"Of {len(EXPECTED)} pairs" in page["counts.md"]


def test_a_family_that_changes_is_noticed():
    right = Outcome(RIGHT, elastic=("heads", "rank"))
    refused = Outcome(REFUSED, "no block")
    assert difference(right, right) is None
    assert difference(refused, Outcome(REFUSED, "there is no block")) is None
    assert "was right" in difference(right, refused)
    assert "was right heads, rank; is right rank" in difference(
        right, Outcome(RIGHT, "", ("rank",))
    )
    assert "was refused no block" in difference(refused, Outcome(REFUSED, "other words"))
    assert "new: right" in difference(None, right)
    graph = Outcome(RIGHT, elastic=("heads", "rank"), onnx="right")
    assert difference(graph, right) is None and "(as ONNX: right)" in difference(right, graph)
