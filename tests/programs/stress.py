"""Kills `elastic train`, `search` and `export` hundreds of times, and counts what that did.

    python tests/programs/stress.py [--kills 200] [--minutes 60] [--seed 0] [--save]

By hand, for it takes an hour or so; not part of the tests. Every subject (a command, and for a
search its storage and number of workers) is begun on a tiny model, killed with SIGKILL, begun again
and killed again, up to five times, and then runs to its end. A kill comes at a random time, or
just after something was seen in the run directory: that a file is being written, that a directory
takes another's place, that the journal has grown. Now and then a line is left torn at the end of
the journal, as a full disk or the loss of power leaves it. One interpreter imports everything once
and forks a child for each start. Latency is a function of the size, plots are not drawn and spaces
not tried; all else is what users run, through `elastic.__main__`.

What the end is compared with is the same command, never killed:

    lost        steps, sub-adapters or files that the other has
    doubled     steps logged twice; sub-adapters measured again though no worker died at them
    left        files and folders that the other has not: in the run, the cache, the system's
                temporary directory
    unequal     factors, figures, written models that differ in any bit; super-adapters and exports
                that were not whole right after a kill
    failed      ends with another exit code than 0, or with none

All must be 0; the exit code says whether. `--save` keeps the figures in
tests/benchmarks/results/stress.json; rows say how many kills there really were.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))

from elastic.__main__ import COMMANDS
from elastic.config import ModelConfig
from elastic.config.parsing import parse
from elastic.files import ASIDE, BUILDING, lock
from elastic.models import loading
from elastic.run import as_plain
from elastic.searching.workers import open_storage
from elastic.training import checkpoints, one_task
from tests.benchmarks.common import report
from tests.helpers.searches import choices_task
from tests.helpers.tiny import ATTENTION, GATE_UP, save_tiny
from tests.helpers.tiny_runs import (
    randomize_factors,
    space_file,
    train_config,
)
from tests.programs.stress_counts import compare_export, compare_search, compare_training
from tests.programs.stress_place import TOLD, Place

KILLS_OF_ONE = 5
"""Before a run may end."""
PATIENCE = 300.0
"""Seconds after which a run has failed to end."""
COUNTS = ("lost", "doubled", "left", "unequal", "failed")
TRIALS = 8
"""Of a space of as many sub-adapters, so that workers in any order measure the same ones."""
SPACE = {
    "blocks": "model.layers.*",
    "adapt": [*ATTENTION, *GATE_UP, "mlp.down_proj"],
    "groups": {
        "width": {"dim": "width", "outputs": GATE_UP, "inputs": ["mlp.down_proj"],
                  "choices": [64, 32]},
        "rank": {"dim": "rank", "of": ATTENTION, "choices": [8, 4], "share": "model"},
    },
}  # fmt: skip


@dataclass
class Subject:
    """One command in one way: how it begins, when it is killed, and what is counted in the end."""

    name: str
    arguments: list[str]
    moments: dict[str, Callable[[Place], Any]]
    """By name, what is seen changing in the run directory; `random` is a time."""
    compare: Callable[[Place, Place, Counter, list[int]], None]
    """With the one that was never killed; given the processes that were."""
    prepare: Callable[[Place], None] = lambda place: None
    workers: int = 1
    kills: Counter = field(default_factory=Counter)
    """By moment."""
    torn: int = 0
    """How often a line was left torn in the journal after one."""
    counts: Counter = field(default_factory=Counter)

    def whole(self, place: Place) -> float:
        """Run it unkilled; seconds that it took."""
        self.prepare(place)
        start = time.monotonic()
        if code := ended(place.begin(self.arguments)):
            raise SystemExit(f"{self.name}: exit code {code}; see {place.log}")
        seconds = time.monotonic() - start
        ended(place.begin(self.arguments))  # as often as the others run to their end, and once more
        return seconds

    def stress(self, place: Place, whole: Place, seconds: float, generator: random.Random) -> None:
        """Kill it up to KILLS_OF_ONE times, run it to its end, and count."""
        self.prepare(place)
        killed: list[int] = []
        children = [place.begin(self.arguments) for _ in range(self.workers)]
        for _ in range(KILLS_OF_ONE):
            at = generator.randrange(self.workers)
            moment = self.killed(place, children[at], seconds, generator)
            if moment is None:
                break
            killed.append(children[at])
            self.kills[moment] += 1
            self.inspect(place, whole)
            if self.name.startswith("search, journal") and generator.random() < 0.3:
                self.torn += torn(place, generator)
            children[at] = place.begin(self.arguments)
        codes = [ended(child) for child in children]
        # The same again: nothing is left to be done.
        codes.append(ended(place.begin(self.arguments)))
        before = Counter(self.counts)
        self.counts["failed"] += sum(code != 0 for code in codes)
        self.compare(place, whole, self.counts, killed)
        if self.counts == before:
            shutil.rmtree(place.folder)
            place.log.unlink()
        else:
            print(f"{self.name}: {dict(self.counts - before)}, see {place.folder}", flush=True)

    def killed(
        self, place: Place, child: int, seconds: float, generator: random.Random
    ) -> str | None:
        """At which moment it was; None if it had ended by itself."""
        moment = generator.choice(["random", *self.moments])
        seen = self.moments.get(moment, lambda _: None)
        earliest = 0.0 if moment == "random" else 0.4  # so much time what was chosen has to come
        until = time.monotonic() + generator.uniform(earliest, 1.2) * seconds
        before = seen(place)
        while running(child):
            if seen(place) != before:
                time.sleep(generator.choice([0, 0, generator.uniform(0, 0.01)]))
                break
            if time.monotonic() > until:
                moment = "random"
                break
            time.sleep(0.005 if moment == "random" else 0)
        else:
            return None
        os.kill(child, signal.SIGKILL)
        status = STATUS.pop(child, None)
        if status is None:
            _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            STATUS[child] = status
            return None
        return moment

    def inspect(self, place: Place, whole: Place) -> None:
        """What stands right after a kill is whole: these appear in one step."""
        for folder in (place.run.super_adapter, *place.run.exports.glob("[!.]*")):
            if folder.is_dir():
                other = whole.folder / folder.relative_to(place.folder)
                missing = {p.name for p in other.iterdir()} - {p.name for p in folder.iterdir()}
                self.counts["unequal"] += bool(missing)


STATUS: dict[int, int] = {}
"""Of children that have ended and were waited for."""


def running(child: int) -> bool:
    if child in STATUS:
        return False
    process, status = os.waitpid(child, os.WNOHANG)
    if process:
        STATUS[child] = status
    return not process


def ended(child: int) -> int | None:
    """The exit code; None for one that had to be ended."""
    until = time.monotonic() + PATIENCE
    while running(child):
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(STATUS.pop(child))


# Moments


def names(folder: Path, ending: str) -> frozenset[str]:
    with contextlib.suppress(OSError):
        return frozenset(name for name in os.listdir(folder) if name.endswith(ending))
    return frozenset()


def being_written(place: Place) -> Any:
    run = place.run
    folders = (run.path, run.path / "train", run.search, run.exports)
    return [names(folder, BUILDING) for folder in folders]


def being_replaced(place: Place) -> Any:
    return [names(folder, ASIDE) for folder in (place.run.search, place.run.exports)]


def replaced(place: Place) -> Any:
    """What was written last takes its place in these."""
    run = place.run
    files = (run.config_file, run.super_adapter, run.sub_adapters, run.front, run.report)
    return [stamp(path) for path in (*files, run.search / "about.json", run.exports / "minimal")]


def checkpoint(place: Place) -> Any:
    """Written, but not yet marked as whole."""
    return [
        (name, (place.run.checkpoints / name / checkpoints.DIGESTS).exists())
        for name in sorted(names(place.run.checkpoints, ""))
    ]


def appended(place: Place) -> Any:
    return stamp(place.run.search / "study.journal"), stamp(place.folder / "study.db")


def measuring(place: Place) -> Any:
    return stamp(place.folder / TOLD)


def stamp(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


def torn(place: Place, generator: random.Random) -> int:
    """Leave half a line at the end of the journal; 1 if there is one to repeat."""
    file = place.run.search / "study.journal"
    if not file.is_file():
        return 0
    with lock(file, wait=True), file.open("rb+") as journal:
        lines = journal.read().splitlines()
        if lines:
            journal.write(lines[-1][: generator.randrange(1, len(lines[-1]))])
        return len(lines[-1:])


# Subjects


def prepare() -> None:
    """This process, before it forks."""
    torch.set_num_threads(1)
    os.environ.update(CI="true", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    one_task.require_fits = lambda *_: None  # half of what each start would take


def warm(base: Path) -> None:
    """What every child would do again: reading settings from docstrings, importing, finding
    classes."""
    for kind, _, _ in (COMMANDS[name] for name in ("train", "search", "export")):
        parse(kind, [])
    for name in (
        "onnx",
        "onnxruntime",
        "openvino",
        "openvino_tokenizers",
        "elastic.formats.openvino",
    ):
        importlib.import_module(name)
    open_storage("sqlite:///:memory:", base)
    loading.load(ModelConfig(path=str(base), dtype="float32", device="cpu"), 0)


def subjects(home: Path, seed: int) -> Iterator[Subject]:
    base = save_tiny(home / "base")
    task = choices_task(home)
    config = train_config(
        base, home / "FOLDER", space=space_file(home, SPACE), seed=seed, task=task, save_steps=2
    )
    recipe = home / "train.yaml"
    plain = as_plain(config)
    del plain["run"]
    recipe.write_text(yaml.safe_dump(plain))
    writing = {"being written": being_written, "replaced": replaced}
    yield Subject(
        "train",
        ["train", "run", "--config", str(recipe)],
        {**writing, "checkpoint": checkpoint},
        compare_training,
    )
    warm(base)
    trained = Place(home / "trained")
    if code := ended(trained.begin(["train", "run", "--config", str(recipe)])):
        raise SystemExit(f"train: exit code {code}; see {trained.log}")
    randomize_factors(trained.run)

    def copy(place: Place) -> None:
        shutil.copytree(trained.run.path, place.run.path)

    settings = [
        "--trials", str(TRIALS), "--starts", "4", "--race", "0", "--test_front", "4",
        "--timing.prompt_tokens", "4", "--timing.new_tokens", "1", "--timing.rounds", "1",
        "--timing.max_rounds", "1", "--seed", str(seed), "--compensation.degrees", "[0.0]",
    ]  # fmt: skip
    for kind, storage in (("journal", []), ("SQLite", ["sqlite:///study.db"])):
        for workers in (1, 2):
            yield Subject(
                f"search, {kind}, {workers} worker{'s' if workers > 1 else ''}",
                ["search", "run", *settings,
                 *(["--study.storage", *storage] if storage else [])],
                {**writing, "aside": being_replaced, "appended": appended, "measuring": measuring},
                compare_search,
                copy,
                workers,
            )  # fmt: skip
    yield Subject(
        "export",
        ["export", "run", "--sub_adapter", "minimal", "--formats", "hf,onnx,openvino",
         "--weigh", "false", "--accuracy", "false", "--runtime_examples", "0",
         "--timing.prompt_tokens", "4", "--timing.new_tokens", "1", "--timing.rounds", "1",
         "--timing.max_rounds", "1"],
        {**writing, "aside": being_replaced},
        compare_export,
        copy,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="subjects whose name begins so")
    parser.add_argument("--folder", type=Path, help="kept; unset: a temporary one")
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    given = parser.parse_args()
    prepare()
    home = given.folder or Path(tempfile.mkdtemp(prefix="stress-"))
    home.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * given.minutes
    asked = []
    for number, subject in enumerate(subjects(home, given.seed)):
        if subject.name.startswith(given.only):
            whole = Place(home / f"{number}-whole")
            seconds = subject.whole(whole)
            print(f"{subject.name}: {seconds:.1f} s, never killed", flush=True)
            asked.append((number, subject, whole, seconds))
    generator = random.Random(given.seed)
    turn = 0

    def kills() -> int:
        return sum(sum(subject.kills.values()) for _, subject, _, _ in asked)

    while kills() < given.kills and time.monotonic() < until:
        number, subject, whole, seconds = asked[turn % len(asked)]
        subject.stress(Place(home / f"{number}-{turn}"), whole, seconds, generator)
        turn += 1
        print(f"{kills()} kills: {subject.name} {dict(subject.kills)}", flush=True)
    rows = {
        subject.name: {
            "kills": sum(subject.kills.values()),
            **{name: subject.counts[name] for name in COUNTS},
            "torn": subject.torn,
            "moments": dict(sorted(subject.kills.items())),
        }
        for _, subject, _, _ in asked
    }
    bad = sum(row[name] for row in rows.values() for name in COUNTS)
    report(
        "stress",
        f"{kills()} kills with SIGKILL; the same command again, beside one that was never killed",
        rows, save=given.save, kills=kills(), seed=given.seed,
        command=f"python tests/programs/stress.py --minutes {given.minutes:g} --seed {given.seed}",
    )  # fmt: skip
    if not bad and given.folder is None:
        shutil.rmtree(home)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
