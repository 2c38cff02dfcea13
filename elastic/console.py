"""What people read: what is under way, on stderr, which never mixes with the last line a script
reads, and tables before it.

In a terminal everything under way has a bar, with an estimate of what is left where it counts, and
is gone afterwards. Elsewhere, in a log, a line every half minute says the same.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from elastic.distributed import is_main

T = TypeVar("T")
stderr = Console(stderr=True, markup=False, emoji=False)  # names and paths are what they are

EVERY = 30.0
"""Seconds between lines in a log."""
PER_SECOND, WIDTH = 2, 20
"""How often bars are drawn, which what is timed meanwhile should not notice, and how wide."""

SHORT = 1.0
"""Seconds before what is part of something else is worth a row of its own."""


class Steps:
    """Something under way. With a total it counts, without one it only takes its time."""

    def __init__(
        self,
        label: str,
        total: int | None,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`done`: of an earlier time, which says nothing of how fast it goes now."""
        self.label, self.total, self.done = label, total, done
        self._before, self._clock = done, clock
        self._began = self._last = clock()

    def to(self, done: int, label: str | None = None) -> None:
        """So many are done; perhaps it is called something else now."""
        self.done, self._last = done, self._clock()
        self.label = label or self.label

    @property
    def seconds(self) -> float:
        """Since it began."""
        return self._clock() - self._began

    @property
    def pace(self) -> float:
        """How many a second; 0 before the first."""
        took = self._last - self._began
        return (self.done - self._before) / took if took > 0 else 0.0

    @property
    def left(self) -> float | None:
        """Seconds, at the pace so far; None where that cannot be told."""
        if self.total is None or not self.pace:
            return None
        since = self._clock() - self._last
        return max(0.0, (self.total - self.done) / self.pace - since)

    @property
    def counted(self) -> str:
        return "" if self.total is None else f"{self.done}/{self.total}"

    @property
    def remaining(self) -> str:
        """What is left; of what does not count, how long it has taken."""
        if self.total is None:
            return spell(self.seconds)
        return "" if self.left is None else f"{spell(self.left)} left"

    def told(self) -> str:
        """All of it, for a log."""
        if self.total is None:
            return f"{self.label}: for {spell(self.seconds)}"
        parts = [f"{self.label}: {self.done} of {self.total}"]
        if self.left is not None:
            parts += [_rate(self.pace), f"about {self.remaining}"]
        return ", ".join(parts)


def spell(seconds: float) -> str:
    """Such as 12 s, 3:05 min or 1:02 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def _rate(pace: float) -> str:
    """So many a second, a minute or an hour: of what there is one at least."""
    for unit, seconds in (("s", 1), ("min", 60)):
        if pace * seconds >= 1:
            return f"{pace * seconds:.1f}/{unit}"
    return f"{pace * 3600:.1f}/h"


class _Board:
    """What is under way in this process, the outermost first."""

    def __init__(self) -> None:
        self.steps: list[Steps] = []
        self._bars: Live | None = None
        self._stop: threading.Event | None = None

    def begin(self, steps: Steps) -> None:
        self.steps.append(steps)
        if len(self.steps) == 1 and is_main():
            self._open()

    def end(self, steps: Steps) -> None:
        """A loop that an error has left may end long after, when nothing is under way."""
        if self.steps == [steps]:
            self.close()
        elif steps in self.steps:
            self.steps.remove(steps)

    def close(self) -> None:
        if self._bars:
            self._bars.stop()
        if self._stop:
            self._stop.set()
        self._bars = self._stop = None
        self.steps = []

    def _open(self) -> None:
        if watched():
            self._bars = Live(
                get_renderable=self.bars,
                console=stderr,
                transient=True,
                refresh_per_second=PER_SECOND,
                redirect_stdout=sys.stdout.isatty(),  # what is printed into a file stays there
            )
            self._bars.start()
        else:
            self._stop = threading.Event()
            threading.Thread(target=self.tell, args=(self._stop.wait,), daemon=True).start()

    def bars(self) -> Table:
        """A row for everything; of a label as much as the others leave room for, on one line."""
        table = Table.grid(Column(), *(Column(no_wrap=True) for _ in range(3)), padding=(0, 1))
        for number, steps in enumerate([*self.steps]):
            if number and steps.seconds < SHORT:
                continue  # it would only flicker
            label = Text(steps.label, no_wrap=True, overflow="ellipsis")
            bar = ProgressBar(steps.total, steps.done, WIDTH, animation_time=time.monotonic())
            table.add_row(label, bar, steps.counted, steps.remaining)
        return table

    def tell(self, stopped: Callable[[float], bool]) -> None:
        """A line every half minute. `stopped` waits so many seconds, unless this is to end."""
        while not stopped(EVERY):
            if now := [steps.told() for steps in [*self.steps]]:
                say("; ".join(now))


_BOARD = _Board()


def watched() -> bool:
    """Whether somebody sees a bar: in a terminal that can draw one."""
    return sys.stderr.isatty() and stderr.is_terminal and not stderr.is_dumb_terminal


@contextlib.contextmanager
def counting(
    label: str, total: int | None, done: int = 0, *, quiet: bool = False
) -> Iterator[Steps]:
    """While the block lasts, something is under way; it says with `Steps.to` how far it is."""
    steps = Steps(label, total, done)
    if not quiet:
        _BOARD.begin(steps)
    try:
        yield steps
    finally:
        _BOARD.end(steps)


def busy(label: str, *, own_bars: bool = False) -> contextlib.AbstractContextManager[Steps]:
    """While the block lasts, something is under way of which nobody knows how far it is: a single
    call of a library. One with `own_bars` shows them in a terminal, and ours stays away."""
    return counting(label, None, quiet=own_bars and watched())


def track(items: Collection[T], label: str, *, quiet: bool = False) -> Iterator[T]:
    """The items, counted while they last (not where `quiet`)."""
    with counting(label, len(items), quiet=quiet) as steps:
        for number, item in enumerate(items, 1):
            yield item
            steps.to(number)


def end_bars() -> None:
    """Nothing is under way any more, whatever an error has left."""
    _BOARD.close()


@contextlib.contextmanager
def logging_at(name: str, level: int) -> Iterator[None]:
    """The logger of a library says nothing below this level while the block lasts."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def wide(width: int = 100) -> Console:
    """Standard output for tables: so many columns at least, also where nobody watches."""
    return Console(width=max(width, Console().width), markup=False, emoji=False)


def say(message: str) -> None:
    """One line on what is going on; one process of several says it."""
    if is_main():
        stderr.print(message, highlight=False, markup=False, soft_wrap=True)


def tabulate(title: str, columns: Collection[str], rows: Collection[Collection[str]]) -> None:
    """A table on what is going on, beside what `say` says."""
    if is_main():
        folded = [Column(column, overflow="fold") for column in columns]
        table = Table(*folded, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        width = max(100, stderr.width)
        Console(stderr=True, width=width, markup=False, emoji=False).print(table)
