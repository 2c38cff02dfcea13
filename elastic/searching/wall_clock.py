"""Where the time of a search goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class WallClock:
    """Seconds by part of the work. A part that lies within another one counts for itself alone, so
    that all parts together are the time since the start."""

    OTHER = "other"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._parts = [self.OTHER]
        self._since = clock()

    @contextlib.contextmanager
    def during(self, part: str) -> Iterator[None]:
        """What passes in this block belongs to the part."""
        self._book()
        self._parts.append(part)
        try:
            yield
        finally:
            self._book()
            self._parts.pop()

    def seconds(self) -> dict[str, float]:
        """So far, by part in the order of their beginning; what belongs to none comes last."""
        self._book()
        found = dict(self._seconds)
        other = found.pop(self.OTHER)
        return {**found, self.OTHER: other}

    def __str__(self) -> str:
        seconds = self.seconds()
        parts = ", ".join(f"{part} {spent:.0f}" for part, spent in seconds.items() if spent >= 0.5)
        return f"{sum(seconds.values()):.0f} seconds: {parts}" if parts else "less than a second"

    def _book(self) -> None:
        now = self._clock()
        part = self._parts[-1]
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._since
        self._since = now
