"""What people read is shown as it is; what takes long says how far it is, in a terminal and in a
log."""

import io
import sys
import threading

import pytest
from rich.console import Console

from elastic import console
from elastic.console import Steps, busy, counting, end_bars, say, spell, track, wide
from tests.helpers.clock import Machine

ODD = "runs/a[/b] [bold]c[/] :smile:"


@pytest.mark.parametrize("how", ["line", "table", "said"])
def test_names_that_read_like_markup_are_names(capsys, how):
    from rich.table import Table

    if how == "said":
        say(ODD)
        assert ODD in capsys.readouterr().err
        return
    table = Table(ODD, title=ODD)
    table.add_row(ODD)
    wide().print(table if how == "table" else ODD, style="red")
    assert capsys.readouterr().out.count(ODD) == (3 if how == "table" else 1)


@pytest.fixture(autouse=True)
def board(monkeypatch):
    """Nothing is under way but what a test begins."""
    fresh = console._Board()
    monkeypatch.setattr(console, "_BOARD", fresh)
    yield fresh
    fresh.close()


def at_work(total, done=0, label="searching"):
    machine = Machine()
    return machine, Steps(label, total, done, clock=machine.clock)


def test_what_is_left_follows_from_the_pace_so_far():
    machine, steps = at_work(50)
    assert steps.told() == "searching: 0 of 50" and steps.remaining == ""
    machine.now = 60.0
    steps.to(4, "searching, last 80%")
    assert steps.left == 46 * 15
    assert steps.told() == "searching, last 80%: 4 of 50, 4.0/min, about 11:30 min left"
    machine.now = 70.0  # within the fifth
    assert steps.left == 46 * 15 - 10
    machine.now = 1e6
    assert steps.left == 0


def test_what_was_done_before_says_nothing_of_the_pace():
    machine, steps = at_work(100, done=90)
    machine.now = 10.0
    steps.to(95)
    assert steps.pace == 0.5 and steps.left == 10


def test_what_does_not_count_says_how_long_it_has_taken():
    machine, steps = at_work(None, label="tracing the graph")
    machine.now = 95.0
    assert steps.told() == "tracing the graph: for 1:35 min" and steps.counted == ""


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (3599, "59:59 min"), (3725, "1:02 h")],
)
def test_times_are_spelled_shortly(seconds, text):
    assert spell(seconds) == text


def test_a_log_has_a_line_every_half_minute_of_all_that_is_under_way(capsys, board):
    machine, outer = at_work(10)
    inner = Steps("scoring", 40, clock=machine.clock)
    waits = []

    def stopped(seconds):
        waits.append(seconds)
        machine.now += seconds
        match len(waits):
            case 1:
                board.steps = [outer]
            case 2:
                outer.to(3)
            case 3:
                board.steps = [outer, inner]
            case 4:
                board.steps = []
        return len(waits) == 5

    board.tell(stopped)
    assert waits == [console.EVERY] * 5 == [30.0] * 5
    assert capsys.readouterr().err.splitlines() == [
        "searching: 0 of 10",
        "searching: 3 of 10, 3.0/min, about 2:20 min left",
        "searching: 3 of 10, 3.0/min, about 1:50 min left; scoring: 0 of 40",
    ]


def test_without_a_terminal_lines_come_while_something_is_under_way_and_then_no_more(
    capsys, monkeypatch
):
    monkeypatch.setattr(console, "EVERY", 0.01)
    seen, told = [], threading.Event()
    monkeypatch.setattr(console, "say", lambda line: (seen.append(line), told.set()))
    for _ in track(range(2), "outer"):
        with busy("inner"):
            assert told.wait(10)
        told.clear()
    telling = [thread for thread in threading.enumerate() if "tell" in thread.name]
    for thread in telling:
        thread.join(2)
    assert not any(thread.is_alive() for thread in telling)
    assert any(line.startswith("outer: 0 of 2; inner: for ") for line in seen)
    told.clear()
    assert not told.wait(0.1)
    assert not capsys.readouterr().err


def test_other_processes_than_the_main_one_are_silent(monkeypatch, board):
    monkeypatch.setenv("RANK", "1")
    with counting("training", 10):
        assert board._stop is None and board._bars is None


@pytest.fixture
def terminal(monkeypatch):
    """One of 80 columns in which somebody watches."""
    shown = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    monkeypatch.setattr(console, "stderr", shown)
    monkeypatch.setattr(console, "watched", lambda: True)
    return shown


def rows(board) -> list[str]:
    plain = Console(file=io.StringIO(), width=80)
    plain.print(board.bars())
    return plain.file.getvalue().splitlines()


def test_every_bar_has_one_line_of_a_narrow_terminal(terminal, board, monkeypatch):
    monkeypatch.setattr(console, "SHORT", 0.0)
    machine, _ = at_work(1)
    label = "stage 2, loss 0.123, 12.3 examples/s (maximal 1.00, random 2.00, minimal 3.00)"
    steps = Steps(label, 200_000, clock=machine.clock)
    machine.now = 100.0
    steps.to(1_000)
    board.begin(steps)
    with busy("tracing the graph"):
        outer, inner = rows(board)
    assert len(outer) <= 80 and outer.startswith("stage 2, loss 0.123")
    assert "… " in outer and outer.rstrip().endswith("1000/200000 5:31 h left")
    assert inner.startswith("tracing the graph ") and inner.rstrip().endswith(" 0 s")


def test_what_is_part_of_something_gets_a_row_when_it_lasts(terminal, board):
    machine, inner = at_work(5)
    with counting("outer", 2):
        board.begin(inner)
        assert len(rows(board)) == 1
        machine.now = console.SHORT
        assert len(rows(board)) == 2
        board.end(inner)
        assert len(rows(board)) == 1


def test_bars_are_gone_afterwards_and_what_is_printed_meanwhile_stays(terminal, board):
    for _ in track(range(2), "outer"):
        console.say("one line")
    assert board._bars is None and not board.steps
    shown = terminal.file.getvalue()
    assert shown.count("one line\n") == 2
    # The last that is drawn is erased, and the cursor is seen again.
    assert "\x1b[2K" in shown.rpartition("outer")[2] and shown.endswith(("\x1b[2K", "\x1b[?25h"))
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1


def test_an_error_in_a_loop_leaves_no_bar(terminal, board):
    """Its traceback keeps the loop alive, bar and all, until somebody ends it."""
    loop = track(range(3), "outer")
    next(loop)
    assert board._bars is not None
    end_bars()
    assert board._bars is None
    with counting("next", 2):
        loop.close()  # as when the traceback is forgotten
        assert [steps.label for steps in board.steps] == ["next"]


@pytest.mark.parametrize("name, value, bars", [
    ("TERM", "xterm", True), ("TERM", "dumb", False), ("RANK", "0", True),
])  # fmt: skip
def test_bars_are_for_terminals_that_draw_them(monkeypatch, name, value, bars):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(console, "stderr", Console(stderr=True))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert console.watched() == bars


def test_colours_forced_in_a_log_are_no_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not console.watched()


def test_a_library_with_bars_of_its_own_has_the_terminal(terminal, board, monkeypatch):
    with busy("fetching", own_bars=True):
        assert not board.steps
    monkeypatch.setattr(console, "watched", lambda: False)
    with busy("fetching", own_bars=True):
        assert [steps.label for steps in board.steps] == ["fetching"]
