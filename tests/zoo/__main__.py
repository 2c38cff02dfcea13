"""Judges families and rewrites what is expected of them, `tests/zoo/outcomes.json`.

    python -m tests.zoo                      all; minutes. Cut off, it goes on where it was
    python -m tests.zoo qwen3 "bert, causal" these alone

Each has a process of its own, so that one that crashes or never ends harms no other.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import select
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from tests.zoo import outcomes
from tests.zoo.graphs import judge_graph
from tests.zoo.judging import RIGHT, WRONG, Outcome, families, judge
from tests.zoo.outcomes import Family, name_of

SECONDS = 120
"""For one family, on a busy machine."""
UNFINISHED = Path("build/zoo.json")


def main(wanted: Sequence[str]) -> int:
    """1 if some family gave a wrong answer, or a traceback."""
    chosen = [one for one in families() if not wanted or {one[0], name_of(one)} & set(wanted)]
    if not chosen:
        raise SystemExit(f"no family is called {', '.join(wanted)}")
    before = outcomes.read()
    UNFINISHED.parent.mkdir(exist_ok=True)
    done = {} if wanted else outcomes.read(UNFINISHED)
    for number, family in enumerate(chosen, 1):
        name = name_of(family)
        if name not in done:
            done[name] = apart(family)
            if not wanted:
                outcomes.write(done, UNFINISHED)
            changed = outcomes.difference(before.get(name), done[name])
            print(f"{number}/{len(chosen)} {name}: {changed or 'as before'}", flush=True)
    outcomes.write({**before, **done} if wanted else done)
    UNFINISHED.unlink(missing_ok=True)
    wrong = [name for name, one in done.items() if WRONG in (one.what, one.onnx.partition(":")[0])]
    print(f"{len(done)} judged; wrong: {', '.join(wrong) or 'none'}")
    return int(bool(wrong))


def apart(family: Family) -> Outcome:
    """Its outcome, judged in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            outcome = judge(*family)
            if outcome.what == RIGHT:
                outcome = replace(outcome, onnx=judge_graph(*family))
        os.write(writing, json.dumps(outcome.as_dict()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        ready, _, _ = select.select([pipe], [], [], SECONDS)
        told = pipe.read() if ready else b""
    if not ready:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if told:
        return outcomes.outcome_of(json.loads(told))
    why = f"its process ended with {status}" if ready else f"not done after {SECONDS} s"
    return Outcome(WRONG, why)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the threads of a pool are not forked, and would be waited for
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(
        prog="python -m tests.zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("family", nargs="*", help="an architecture, or its name with the task")
    sys.exit(main(parser.parse_args().family))
