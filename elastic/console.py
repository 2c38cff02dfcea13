"""What people read: progress bars on stderr, which never mix with the last line a script reads, and
tables before it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.progress import track as rich_track

from elastic.distributed import is_main

T = TypeVar("T")
stderr = Console(stderr=True, markup=False, emoji=False)  # names and paths are what they are


def track(items: Sequence[T], label: str, *, quiet: bool = False) -> Iterator[T]:
    """The items, with a bar while they last (gone afterwards; none when nobody watches)."""
    if quiet or not sys.stderr.isatty():
        yield from items
        return
    yield from rich_track(items, description=escape(label), console=stderr, transient=True)


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


def counting_bar(*, transient: bool) -> Progress:
    """A bar that counts steps or trials; silent when nobody watches."""
    return Progress(
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=transient,
        disable=not stderr.is_terminal,
    )


def wide(width: int = 100) -> Console:
    """Standard output for tables: so many columns at least, also where nobody watches."""
    return Console(width=max(width, Console().width), markup=False, emoji=False)


def say(message: str) -> None:
    """One line on what is going on; one process of several says it."""
    if is_main():
        stderr.print(message, highlight=False, markup=False, soft_wrap=True)
