"""The parts of a search's time are disjoint, and together all of it."""

import pytest

from elastic.searching.wall_clock import WallClock


class Hand:
    """A clock moved by hand."""

    now = 100.0

    def __call__(self):
        return self.now

    def move(self, seconds):
        self.now += seconds


def test_a_part_within_a_part_counts_once():
    hand = Hand()
    clock = WallClock(hand)
    hand.move(1)
    with clock.during("outer"):
        hand.move(2)
        with clock.during("inner"):
            hand.move(4)
        hand.move(8)
        with clock.during("inner"):
            hand.move(16)
    hand.move(32)
    assert clock.seconds() == {"outer": 10, "inner": 20, WallClock.OTHER: 33}
    assert str(clock) == "63 seconds: outer 10, inner 20, other 33"


def test_what_raised_has_taken_time_too():
    hand = Hand()
    clock = WallClock(hand)
    with pytest.raises(ValueError), clock.during("failing"):
        hand.move(3)
        raise ValueError
    hand.move(1)
    assert clock.seconds() == {"failing": 3, WallClock.OTHER: 1}
    hand.move(1)
    assert clock.seconds()[WallClock.OTHER] == 2
