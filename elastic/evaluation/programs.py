"""Programs that a model has written, run to see whether they are right.

Each runs in a process of its own: in an empty folder that is removed afterwards, without this
process's environment (tokens and passwords are there), with limits on time, memory and the size of
files where the system has them, and killed with all that it started. That stops what is wrong or
endless. It stops nobody who means harm: the program may read your files and use the network, as you
may. Hence `--run_code`; use a container for models that you do not trust.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SECONDS = 5.0
"""That a program may take; starting Python is part of it."""
MEMORY, FILE = 4 << 30, 1 << 20
"""Bytes that it may have, and write to one file."""
_LAUNCH = """
import runpy, sys
program, done, seconds, memory, size = sys.argv[1:]
try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None
else:
    limits = {"CPU": int(float(seconds)) + 1, "AS": int(memory), "FSIZE": int(size), "CORE": 0}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
sys.argv[:] = [program]
runpy.run_path(program, run_name="__main__")
open(done, "w").close()
"""
_KEPT = ("PATH", "SYSTEMROOT")


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether the program comes to its end in time: without an error, and without leaving early,
    which would skip the tests at its end."""
    with tempfile.TemporaryDirectory(prefix="elastic-code-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        file, done = folder / "program.py", folder / "done"
        file.write_text(program, encoding="utf-8", errors="replace")
        environment = {key: os.environ[key] for key in _KEPT if key in os.environ}
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _LAUNCH, file, done, str(seconds), str(MEMORY), str(FILE)],
            cwd=folder, env={**environment, "HOME": name, "TMPDIR": name}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _kill(process)
        return process.returncode == 0 and done.is_file()


def passed(programs: Sequence[str], seconds: float = SECONDS) -> list[bool]:
    """Of every program, several at a time."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(lambda program: passes(program, seconds), programs))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """It and what it started."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
