"""Forked processes: what only one that dies can show."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable

import torch


def forked(act: Callable[[], object]) -> int:
    """A child process at `act`, which ends there: 0 when it returns, else 1."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(
                1
            )  # the threads of a pool are not forked, and would be waited for
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """Its exit code; less than 0: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def all_ended(children: list[int]) -> list[int]:
    """Exit codes of children that wait for one another: one that fails ends the others."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            number, status = os.waitpid(child, os.WNOHANG)
            if number:
                codes[child] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
                codes[child] = ended(child)
        time.sleep(0.02)
    return [codes[child] for child in children]
