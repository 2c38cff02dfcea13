"""What `make demo` ended with, into results/, README and its picture.

    time make .venv-demo/ready; time .venv-demo/bin/elastic train --config demo-train; ...
    python -m tests.benchmarks.demo RUN --install 8 --train 170 --search 100 --export 100 [--save]

RUN is `runs/demo` of a fresh clone; the four numbers are the seconds of its steps, with no packages
and no model in the cache. Without `--save` the block for README is printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
from pathlib import Path

from elastic.files import read_json
from elastic.run import Run
from fragments.figures import demo
from tests.benchmarks.common import RESULTS

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
STEPS = ("install", "train", "search", "export")


def block(found: dict) -> str:
    """Both tables, and what to know of them."""
    front, written, times = demo(found).split("\n\n")
    best = next(one for one in found["front"] if one["best"])
    low, high = best["difference_interval"]
    report = found["report"]
    budget = report["budget"]["prefill_ms"].replace("%", " %")
    return f"""{front}

The full model has {best["full_accuracy"]:.1%}; the best one within {budget} of its prefill is \
{100 * best["difference"]:+.1f} points from it on the same examples (95 % interval {100 * low:.1f} \
to {100 * high:.1f}). Percentages of milliseconds are of the full model's, measured (torch, \
float32). What was written of the best one, each beside the full model in the same \
runtime, speed-ups as medians of turns with their interval:

{written}

{found["date"]}, {report["device"]}. {times}"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    for step in STEPS:
        parser.add_argument(f"--{step}", type=int, required=True, help="seconds")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    run = Run(given.run)
    report = read_json(run.path / "export" / "best" / "report.json")
    found = {
        "benchmark": "demo", "command": "make demo", 
        "date": datetime.date.today().isoformat(),
        "seconds": {step: getattr(given, step) for step in STEPS},
        "front": read_json(run.search / "front.json"), "report": report,
    }  # fmt: skip
    text = block(found)
    print(text)
    if given.save:
        (RESULTS / "demo.json").write_text(json.dumps(found, indent=2) + "\n")
        shutil.copy(run.search / "front.png", RESULTS / "demo-front.png")
        readme = README.read_text(encoding="utf-8")
        before, after = readme[: readme.index(BEGIN)], readme[readme.index(END) :]
        README.write_text(f"{before}{BEGIN}\n{text}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
