"""This environment as `pip install elastic-adapters` alone would make it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def base_distributions(requirements: list[str]) -> list[metadata.Distribution]:
    """Of these requirements, and of what they require in turn, those that are installed."""
    found: dict[str, metadata.Distribution] = {}
    wanted = [(Requirement(line), "") for line in requirements]
    while wanted:
        requirement, extra = wanted.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        if name not in found:
            try:
                found[name] = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                continue  # such as what only builds with CUDA need
            wanted += [(Requirement(line), "") for line in found[name].requires or ()]
        for more in requirement.extras:
            wanted += [(Requirement(line), more) for line in found[name].requires or ()]
    return [*found.values()]


def link_base(requirements: list[str], site: Path) -> None:
    """A folder for PYTHONPATH with the base's packages and no others."""
    for distribution in base_distributions(requirements):
        for file in distribution.files or ():
            top = site / file.parts[0]
            if file.parts[0] in ("..", "__pycache__") or top.exists():
                continue
            place = Path(str(distribution.locate_file(file.parts[0])))
            if file.suffix != ".pth" or len(file.parts) > 1:
                top.symlink_to(place)


def run_in(site: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python with this folder's packages and its own library; `folder` is where it runs."""
    return subprocess.run(
        [sys.executable, "-S", "-P", *arguments], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
