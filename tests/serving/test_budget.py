"""The slice that a budget leads to, on a device that is known and on another."""

import pytest

from elastic.errors import BudgetError, ConfigError, RunError
from elastic.formats.choosing import Timed
from elastic.serving.budget import as_budget, as_timed, choose, timed_here

SLICES = {
    "full": {"params": 100, "macs": 90, "validation_estimate": 0.9, "memory_mb": 10.0},
    "front-2": {"params": 80, "macs": 70, "validation_estimate": 0.85, "memory_mb": 8.0},
    "front-1": {"params": 50, "macs": 40, "validation_estimate": 0.6, "memory_mb": 5.0},
    "unsearched": {"params": 60, "macs": 50},
}
HERE = Timed(
    "here", 2, 32, 4,
    {
        "full": {"prefill_ms": 100.0, "decode_ms": 10.0},
        "front-2": {"prefill_ms": 80.0, "decode_ms": 9.0},
        "front-1": {"prefill_ms": 50.0, "decode_ms": 5.0},
    },
)  # fmt: skip


def chosen(budget, timed=HERE) -> str:
    return choose(SLICES, timed, as_budget(budget), "folder")


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        ("100%", "full"),
        ("80%", "front-2"),
        (79.9, "front-1"),
        ({"prefill_ms": 80}, "front-2"),
        ({"decode_ms": 5}, "front-1"),
        ({"tokens_per_second": 220}, "front-2"),  # 2 sequences, 9 ms a token
        ({"params": 79, "min_accuracy": 0.5}, "front-1"),
        ({"min_accuracy": 0.8}, "front-2"),  # the cheapest that has it
        ({"max_accuracy_drop": 0.31}, "front-1"),
        ({"memory_mb": "80%"}, "front-2"),
    ],
)
def test_the_most_accurate_within_the_budget(budget, name):
    assert chosen(budget) == name


def test_what_nothing_meets_names_the_nearest():
    with pytest.raises(BudgetError, match=r"prefill_ms 20.*cheapest: front-1 .*50\.0 ms.*full \("):
        chosen(20)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"prefil_ms": 3}, "prefil_ms is no limit; choose from prefill_ms"),
        ("fast", "budget.prefill_ms is 'fast'"),
        (0, "must be positive"),
    ],
)
def test_what_is_no_budget_is_refused(budget, message):
    with pytest.raises(ConfigError, match=message):
        as_budget(budget)


def test_what_is_not_known_is_named():
    with pytest.raises(RunError, match=r"budget\.prefill_ms: that is not known"):
        choose(SLICES, None, as_budget("80%"), "folder")
    with pytest.raises(RunError, match="no latency is known of these slices"):
        timed_here([], as_budget("80%"), "here", dict, "folder")
    with pytest.raises(RunError, match="here: device is missing"):
        as_timed({}, "here")


def refuse(_):
    raise AssertionError("nothing has to be measured")


def test_a_known_device_is_looked_up():
    assert timed_here([HERE], as_budget(25), "here", refuse, "folder") is HERE
    assert timed_here([HERE], as_budget({"params": 3}), "there", refuse, "folder") is None


def test_parts_of_the_full_model_are_taken_from_elsewhere(capsys):
    assert timed_here([HERE], as_budget("80%"), "there", refuse, "folder") is HERE
    assert "are those of here" in capsys.readouterr().err


def test_another_device_is_measured_and_scales_the_table(capsys):
    """Twice as slow at prefill, half as slow a token: shares of the full model stay."""
    there = timed_here(
        [HERE], as_budget(100), "there", lambda table: {"prefill_ms": 200.0, "decode_ms": 5.0}, "f"
    )
    assert there.slices["front-1"] == {"prefill_ms": 100.0, "decode_ms": 2.5}
    assert "Not known on there" in capsys.readouterr().err
    assert chosen(100, there) == "front-1" and chosen(160, there) == "front-2"
