"""Where a subject of the stress program runs, and how its child processes begin."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.__main__ import main as elastic_main
from elastic.files import write_bytes
from elastic.latency import bench
from elastic.run import Run
from elastic.searching import front
from elastic.searching.objective import Objective
from tests.helpers.tiny_runs import fake_measure

TOLD = "asked.jsonl"
"""Which process measured which sub-adapter, a line each; removed before comparing."""


@dataclass
class Place:
    """Where one subject runs: all that it may write to, and nothing else."""

    folder: Path
    logs: Path | None = None
    """Unset: beside it."""

    def __post_init__(self) -> None:
        for path in (self.cache, self.temporary):
            path.mkdir(parents=True, exist_ok=True)

    @property
    def run(self) -> Run:
        return Run(self.folder / "run")

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def temporary(self) -> Path:
        return self.folder / "temporary"

    @property
    def log(self) -> Path:
        return (self.logs or self.folder.parent) / f"{self.folder.name}.log"

    def begin(self, arguments: list[str]) -> int:
        """A child process at `elastic ARGUMENTS`."""
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            descriptor = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            os.environ.update(ELASTIC_CACHE=str(self.cache), TMPDIR=str(self.temporary))
            tempfile.tempdir = None
            os.chdir(self.folder)
            as_told(self.folder)
            code = elastic_main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def listing(self) -> set[str]:
        """All that is there, by name."""
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}


def as_told(folder: Path) -> None:
    """In a child: what would cost minutes and hides nothing."""
    call = Objective.__call__

    def told(self: Objective, candidate: Any, *rivals: Any) -> Any:
        with (folder / TOLD).open("a") as file:
            file.write(json.dumps([os.getpid(), str(candidate)]) + "\n")
        return call(self, candidate, *rivals)

    Objective.__call__ = told
    bench.measure = fake_measure
    front.draw = lambda _, path: write_bytes(path, b"plot")
