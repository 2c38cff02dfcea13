"""Our search beside the state of the art, on a trained run: one process, one seed, some rivals.

    python -m tests.benchmarks.rivals_on RUN TABLE OUT --rival puzzle,evopress --seed 0

RUN is a trained run, TABLE its latency table (`elastic latency RUN --save TABLE`), OUT a folder. A
unit is so many accuracies (`--unit`) of so many validation examples (`--examples`); a divergence
costs its rows, for every degree of compensation that is tried. What is selected, `--members` at
most, is scored on test examples that no search saw. Every measure and every front is a line of
OUT/seed-SEED.jsonl at once: run again what was killed, and it goes on. Several processes may share
OUT, one for each seed, or for some rivals of it. `tests.benchmarks.rivals_table` makes the table.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import optuna

from elastic.provenance import provenance
from elastic.run import Run
from tests.benchmarks.rivals import RIVALS
from tests.benchmarks.texts import Measured

SETTINGS = (
    "unit", "examples", "rows", "pool", "degrees", "members", "test", "validation", "cost", "dtype"
)  # fmt: skip
"""What all processes of one OUT have in common."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("table")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rival", default="all", help=", ".join(RIVALS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--units", default="1,2,4")
    parser.add_argument("--unit", type=int, default=25, help="accuracies")
    parser.add_argument("--examples", type=int, default=200, help="of an accuracy")
    parser.add_argument("--rows", type=int, default=32, help="of a divergence")
    parser.add_argument("--pool", type=int, default=128, help="rows that divergences draw from")
    parser.add_argument("--degrees", default="0.5", help="of compensation: 0.5, or 0,0.5,1")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--validation", type=int, default=0, help="more than the run had")
    parser.add_argument("--cost", default="prefill_ms")
    parser.add_argument("--dtype", default=None, help="as trained unless given")
    parser.add_argument("--batch_tokens", type=int, default=16384)
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    names = list(RIVALS) if given.rival == "all" else given.rival.split(",")
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(given, name) for name in SETTINGS}
    kept = given.out / "settings.json"
    if kept.is_file() and json.loads(kept.read_text()) != settings:
        raise SystemExit(f"{kept} has other settings: {kept.read_text()}")
    kept.write_text(json.dumps(settings))
    file = given.out / f"seed-{given.seed}.jsonl"
    began = time.perf_counter()
    world = Measured(Run(given.run), given.table, file, given)
    ends = {"full": world.maximal, "least": world.minimal}
    about = {
        name: {"cost": world.cost(row), "marks": world.tested(row)} for name, row in ends.items()
    }
    done = {
        (one["rival"], one["units"])
        for one in map(json.loads, file.read_text().splitlines())
        if one.get("what") == "front"
    }
    device = provenance(str(world.net.device))["device"]
    print(f"ready after {time.perf_counter() - began:.0f} s on {device}", flush=True)
    for units in map(float, given.units.split(",")):
        for name in names:
            if (name, units) in done:
                continue
            began = time.perf_counter()
            world.begin(units * given.unit * world.examples)
            chosen = RIVALS[name](world, given.seed)
            seconds = time.perf_counter() - began
            members = [
                {"at": row, "cost": world.cost(row), "marks": world.tested(row)} for row in chosen
            ]
            world.write({
                "what": "front", "rival": name, "seed": given.seed, "units": units,
                "spent": world.spent, "seconds": seconds, "device": device, "members": members,
                **about,
            })  # fmt: skip
            shares = [round(one["marks"].count("1") / len(one["marks"]), 3) for one in members]
            print(f"{name}, {units:g} units: {shares} after {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
