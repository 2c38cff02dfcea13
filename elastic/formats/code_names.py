"""Names of Python code in settings, which no folder of ours passes on."""

from __future__ import annotations

from typing import Any

NAMES_CODE = ("auto_map", "custom_pipelines")
"""Settings that name Python code, perhaps of another repository, for transformers to run."""


def without_code(values: Any) -> Any:
    """Settings, those within settings too, without the names of code."""
    if isinstance(values, dict):
        return {k: without_code(value) for k, value in values.items() if k not in NAMES_CODE}
    return [without_code(value) for value in values] if isinstance(values, list) else values
