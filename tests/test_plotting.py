"""Intervals as error bars; the pictures themselves are looked at."""

import pytest

from elastic.evaluation.statistics import wilson
from elastic.plotting import percent_bars


@pytest.mark.parametrize("n", [1, 6, 8, 100, 200])
def test_bars_reach_from_the_interval_to_its_end_and_are_never_negative(n):
    rights = sorted({0, n // 2, n})
    intervals = [wilson(right, n) for right in rights]
    heights, (below, above) = percent_bars([right / n for right in rights], intervals)
    assert heights == [100 * right / n for right in rights]
    for y, down, up, (low, high) in zip(heights, below, above, intervals, strict=True):
        assert down >= 0 and up >= 0  # wilson(0, n) may begin a hair above 0
        assert y - down == pytest.approx(100 * low) and y + up == pytest.approx(100 * high)
