"""Searches of tiny runs, and what they leave behind."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from elastic.config import CompensationConfig, SearchConfig, TaskConfig
from elastic.latency.measure import Latency
from elastic.run import Run
from elastic.spaces.bound import SubAdapter
from elastic.training.one_task import train_one
from tests.helpers.tiny_runs import ONE_ROUND, randomize_factors, space_file, train_config

GRAPH = replace(ONE_ROUND, runtime="onnx")
SPEED = {None: 1.0, "int8": 0.5, "int4": 0.7}
"""Parts of the time that weights as they are take: fewer bits need not be faster."""
NAMES = ("Tom", "Ann", "Sam", "Eva", "Ben", "Mia")


def choices_task(folder) -> TaskConfig:
    """Which of two letters: even random weights are right now and then, and sub-adapters differ."""
    splits = {"train": range(32), "validation": range(32, 62), "test": range(62, 84)}
    files = {}
    for split, numbers in splits.items():
        rows = []
        for n in numbers:
            options = [chr(97 + n % 26), chr(97 + (n * 7 + 3) % 26)]
            prompt = f"{NAMES[n % 6]} {n}:"
            rows.append({"prompt": prompt, "options": options, "answer": options[n % 2]})
        files[split] = folder / f"{split}.jsonl"
        files[split].write_text("\n".join(json.dumps(row) for row in rows))
    return TaskConfig(
        name="jsonl", options="options", **{split: str(file) for split, file in files.items()}
    )


def trained_run(base, folder, declared=None) -> Run:
    space = space_file(folder, declared)
    config = train_config(base, folder / "run", space=space, task=choices_task(folder))
    run = train_one(config)
    randomize_factors(run)
    return run


def config(run: Run, **overrides) -> SearchConfig:
    """Nothing is made up for, which takes a third of such a search; who means that says so."""
    settings = dict(
        trials=8, starts=4, population=4, timing=ONE_ROUND, test_front=50, race=0.0,
        compensation=CompensationConfig(degrees=[0.0]),
    )  # fmt: skip
    return SearchConfig(run=str(run.path), **(settings | overrides))


def measured(run: Run) -> list[dict[str, str]]:
    """The trials without what is believed of them, which every further one may change."""
    believed = ("accuracy_estimate", "feasible")
    return [{k: v for k, v in row.items() if k not in believed} for row in trials_of(run)]


def trials_of(run: Run) -> list[dict[str, str]]:
    return list(csv.DictReader((run.search / "trials.csv").read_text().splitlines()))


def front_of(run: Run) -> list[dict]:
    return json.loads(run.front.read_text())


def sub_of(row) -> SubAdapter:
    return SubAdapter(tuple(json.loads(row["sub_adapter"]).items()))


def data_of(run) -> dict:
    page = run.report.read_text()
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    return json.loads(found[1])


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def shown_by_browser(run: Run, folder: Path, wanted: str = "") -> str:
    """The page as Chromium has built it, opened at `wanted`; its profile goes into `folder`."""
    page = folder / "report.html"
    shutil.copy(run.report, page)
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=9000",
         f"--user-data-dir={folder / 'profile'}", "--dump-dom", f"{page.as_uri()}{wanted}"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return done.stdout


@dataclass(frozen=True)
class Measured:
    """What a measurement says of the full model."""

    prefill_ms: float
    decode_ms: float

    @property
    def full(self) -> Latency:
        return Latency(self.prefill_ms, self.decode_ms, 0.0)
