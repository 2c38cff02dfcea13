"""What strangers might write: plain data and bytes with something wrong in them.

CI tries 50 cases of each fuzzer, always the same; ELASTIC_FUZZ=1000 tries so many others.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from elastic.errors import ElasticError

COUNT = os.environ.get("ELASTIC_FUZZ")
fuzzed = settings(
    max_examples=int(COUNT or 50),
    derandomize=COUNT is None,
    deadline=None,
    database=None,
    phases=[Phase.generate] if COUNT is None else [Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
CANARY = "canary_of_the_fuzzers"
"""A module that nothing may import; `canary` makes it importable."""
EVIL = f"{CANARY}.Evil"


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


STRANGE = [
    None, True, -1, 0, 5, 0.5, float("inf"), float("nan"), 10**20, 10**400, 1e308, "", " ", "null",
    EVIL, {"class_path": EVIL}, {"class_path": EVIL, "init_args": {}}, [EVIL],
    [{"class_path": EVIL}],
    f"!!python/object/apply:{EVIL} []", "&a [*a]", "{a: b", [], [[]], [None], {}, {"": 1}, [1, "a"],
    {"a": {"b": [1]}}, "x\0y", "../../x", "/", "a\nb", "{0.__class__}", "{prompt!r:>9}", "{",
    "é\u2028",
    "\ud800", "9" * 400 + "%", "1e400", "x" * 5000, nested(70), nested(150), float(2**70),
]  # fmt: skip


@contextlib.contextmanager
def canary(folder) -> Iterator[None]:
    """While it lasts the module can be imported; afterwards it must not have been."""
    (folder / f"{CANARY}.py").write_text("class Evil: pass\n")
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
    assert CANARY not in sys.modules


def works_or_is_refused(use, *arguments) -> Any:
    """What `use` gives, or None where it refuses in one line; any other exception is a fault."""
    try:
        return use(*arguments)
    except ElasticError as error:
        assert str(error) and len(str(error).splitlines()) == 1, f"not one line: {error}"
        return None


def places(value: Any, start: tuple = ()) -> Iterator[tuple]:
    """Paths to all values in plain data."""
    yield start
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(one, (*start, key))


@st.composite
def mutated(draw, values: st.SearchStrategy[Any]) -> Any:
    """Plain data of which one to three values are strange, missing, doubled or named otherwise."""
    value = copy.deepcopy(draw(values))
    for _ in range(draw(st.integers(1, 3))):
        *outer, last = draw(st.sampled_from([p for p in places(value) if p] or [(None,)]))
        if last is None:
            return draw(st.sampled_from(STRANGE))
        parent = value
        for key in outer:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "rename", "wrap"])):
            case "replace":
                parent[last] = copy.deepcopy(draw(st.sampled_from(STRANGE)))
            case "remove":
                del parent[last]
            case "rename" if isinstance(parent, dict):
                parent[draw(st.sampled_from(["class_path", "init_args", "x", f"{last}.y"]))] = (
                    parent.pop(last)
                )
            case _:
                parent[last] = draw(st.sampled_from([[parent[last]], {"class_path": parent[last]}]))
    return value


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Bytes cut off, changed, doubled, or something else altogether."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["cut", "change", "insert", "double", "other"])):
            case "cut":
                del content[at : at + draw(st.sampled_from([1, 8, len(content)]))]
            case "change" if content:
                content[at] = draw(st.integers(0, 255))
            case "insert":
                content[at:at] = draw(st.sampled_from(PIECES))
            case "double":
                content += content[at:]
            case _:
                content = bytearray(draw(st.sampled_from(PIECES)))
    return bytes(content)


PIECES = [
    b"", b"\0", b"\xff\xfe", b"caf\xe9", b"[" * 5000, b'{"a":' * 2000, b"9" * 5000, b"&a [*a]",
    b"*a", b"null",
    b"!!python/object/apply:os.getcwd []", b"\n", b"- ", b": ", b'"', b"{}", b"[]", b"NaN",
    b"1e400",
    b"\x80\x04\x95", b"PK\x03\x04", b"\t", b"\xed\xa0\x80", b'{"__metadata__": {}}',
]  # fmt: skip
