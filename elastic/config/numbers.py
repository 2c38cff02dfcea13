"""Numbers that no setting may be, whatever it says."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any

from elastic.errors import require

SEEDS = 2**32
"""As many as every generator takes."""


def require_numbers(settings: Any, start: str = "") -> None:
    """ConfigError for a number, in these settings or in groups of them, that is infinite or NaN,
    and for a seed that some generator would not take."""
    for field in fields(settings):
        name, value = f"{start}{field.name}", getattr(settings, field.name)
        for one in value if isinstance(value, list) else [value]:
            if is_dataclass(one):
                require_numbers(one, f"{name}.")
            finite = not isinstance(one, float) or math.isfinite(one)
            require(finite, f"{name} is {one}; give a finite number")
        if field.name == "seed":
            require(0 <= value < SEEDS, f"{name} is {value}; choose from 0 to {SEEDS - 1}")
