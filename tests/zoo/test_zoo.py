"""Every family of the installed transformers does what `outcomes.json` says of it.

A third of them with every change, all by hand: `pytest -m slow tests/zoo`. A change that is meant
is written by `python -m tests.zoo`.
"""

import pytest

from tests.zoo import outcomes
from tests.zoo.judging import NOT_BUILT, REFUSED, RIGHT, Outcome, families, judge
from tests.zoo.outcomes import difference, in_ci, name_of

EXPECTED = outcomes.read()
pytestmark = pytest.mark.skipif(not EXPECTED, reason="seen with another release of transformers")


def marked(family):
    name = name_of(family)
    return pytest.param(family, id=name, marks=() if in_ci(name) else pytest.mark.slow)


@pytest.mark.parametrize("family", map(marked, families()))
def test_a_family_is_as_it_was(family):
    changed = difference(EXPECTED.get(name_of(family)), judge(*family))
    assert changed is None, changed


def test_every_family_is_expected_to_be_something():
    """And none to be wrong."""
    assert EXPECTED.keys() == {name_of(family) for family in families()}
    assert {one.what for one in EXPECTED.values()} == {RIGHT, REFUSED, NOT_BUILT}


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
