"""Dominance is what its definition says, whatever the order of the points."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.searching.pareto import hypervolume, non_dominated, thin

# Few distinct values, so that ties and duplicates are common.
VALUES = st.sampled_from([0.0, 1.0, 2.0, 3.5, 7.0])
CLOUDS = st.integers(1, 3).flatmap(
    lambda objectives: st.lists(st.tuples(*[VALUES] * objectives), max_size=14)
)


def dominates(a, b) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def front_of(points) -> list[tuple[float, ...]]:
    return [points[index] for index in non_dominated(points)]


@given(CLOUDS)
def test_front_is_the_points_nobody_dominates_each_once(points):
    expected = {p for p in points if not any(dominates(q, p) for q in points)}
    assert sorted(front_of(points)) == sorted(expected)


@given(CLOUDS)
def test_front_is_sorted_by_the_first_objective(points):
    first = [point[0] for point in front_of(points)]
    assert first == sorted(first)


@given(CLOUDS.flatmap(lambda points: st.tuples(st.just(points), st.permutations(points))))
def test_order_does_not_matter(clouds):
    points, shuffled = clouds
    assert front_of(points) == front_of(shuffled)


@given(CLOUDS, st.data())
def test_duplicates_and_dominated_points_change_nothing(points, data):
    extra = []
    if points:
        copied = data.draw(st.lists(st.sampled_from(points), max_size=4))
        worse = data.draw(st.lists(st.sampled_from(points), max_size=4))
        extra = [*copied, *(tuple(x + 1 for x in point) for point in worse)]
    assert front_of([*points, *extra]) == front_of(points)


def test_no_points_no_front():
    assert non_dominated([]) == []
    assert hypervolume([], (1.0, 1.0)) == 0


SIZES = st.integers(1, 40)


@given(SIZES, st.integers(1, 12), st.data())
def test_thin_keeps_the_ends_and_the_chosen_one(size, count, data):
    indices = data.draw(st.permutations(range(100, 100 + size)))
    keep = data.draw(st.sampled_from(indices))
    chosen = thin(indices, count, keep)
    assert len(chosen) == min(size, count)
    assert len(set(chosen)) == len(chosen)
    assert chosen == [index for index in indices if index in chosen]  # in the order given
    assert keep in chosen
    if count > 2 or (count == 2 and keep in (indices[0], indices[-1])):
        assert {indices[0], indices[-1]} <= set(chosen)


@pytest.mark.parametrize("count", range(2, 9))
def test_thin_is_evenly_spread(count):
    chosen = thin(range(100), count, keep=99)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert max(gaps) - min(gaps) <= 1


@given(CLOUDS.filter(bool))
def test_hypervolume_is_the_area_of_dominated_cells(points):
    """Counted on a grid of half units, for clouds of two objectives."""
    points = [(*point, 0.0)[:2] for point in points]
    cells = [(x / 2 + 0.25, y / 2 + 0.25) for x in range(-2, 16) for y in range(-2, 16)]
    inside = [c for c in cells if any(p[0] <= c[0] and p[1] <= c[1] for p in points)]
    counted = sum(x <= 5 and y <= 6 for x, y in inside) / 4
    assert hypervolume(points, (5.0, 6.0)) == pytest.approx(counted)
