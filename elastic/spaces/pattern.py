"""Names of blocks as a space writes them: `*` for any part between dots, and in braces the numbers
of some, `model.layers.{0,2,4..6}`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from elastic.errors import ConfigError

_BRACES = re.compile(r"\{([^{}]*)\}")
_ITEM = re.compile(r"(\d+)(?:\.\.(\d+))?")
MOST = 100_000
"""Past the number of every block."""


def matching(pattern: str, where: str) -> re.Pattern[str]:
    """What the names of a pattern's blocks match; ConfigError for braces without numbers."""
    parts, end = [], 0
    for braces in _BRACES.finditer(pattern):
        numbers = _numbers(braces[1], pattern, where)
        parts += [_starred(pattern[end : braces.start()]), f"(?:{'|'.join(map(str, numbers))})"]
        end = braces.end()
    rest = pattern[end:]
    if "{" in rest or "}" in rest:
        raise _wrong(pattern, where)
    return re.compile("".join([*parts, _starred(rest)]))


def pattern_of(name: str, numbers: Sequence[int], full: int) -> str:
    """Of the blocks with these numbers, ascending, in a list of that name and length."""
    if len(numbers) == full:
        return f"{name}.*"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    items = [
        item
        for run in runs
        for item in ([f"{run[0]}..{run[-1]}"] if len(run) > 2 else map(str, run))
    ]
    return f"{name}.{numbers[0]}" if len(numbers) == 1 else f"{name}.{{{','.join(items)}}}"


def _starred(text: str) -> str:
    return re.escape(text).replace(r"\*", r"[^.]+")


def _numbers(items: str, pattern: str, where: str) -> Iterator[int]:
    for item in items.split(","):
        found = _ITEM.fullmatch(item.strip())
        if found is None:
            raise _wrong(pattern, where)
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last >= MOST:
            raise _wrong(pattern, where)
        yield from range(first, last + 1)


def _wrong(pattern: str, where: str) -> ConfigError:
    return ConfigError(
        f"{where}: blocks {pattern!r}: braces hold numbers of blocks and ascending ranges of them, "
        "such as model.layers.{0,2,4..6}"
    )
