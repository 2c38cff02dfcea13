"""The table of what `tests.benchmarks.rivals_on` found.

    python -m tests.benchmarks.rivals_table OUT [--name agnews] [--save]

A figure is the hypervolume of the selected sub-adapters and the full model at their accuracies on
test examples, the full latency and the minimal one's accuracy being the reference, in percent of
the box between the minimal and the full one: 100 has all of the accuracy at the least latency.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from elastic.searching.pareto import hypervolume
from tests.benchmarks.common import report
from tests.benchmarks.worlds import interval


def worth(line: dict) -> float:
    """Of one front, in percent."""

    def share(one: dict) -> float:
        return one["marks"].count("1") / len(one["marks"])

    full, least = line["full"], line["least"]
    points = [(one["cost"], -share(one)) for one in (full, least, *line["members"])]
    box = (full["cost"] - least["cost"]) * (share(full) - share(least))
    return 100 * hypervolume(points, (full["cost"], -share(least))) / box


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", default="agnews")
    parser.add_argument("--ours", default="screened")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    fronts = [
        one
        for file in sorted(given.out.glob("seed-*.jsonl"))
        for one in map(json.loads, file.read_text().splitlines())
        if one["what"] == "front"
    ]
    values = {(one["rival"], one["units"], one["seed"]): worth(one) for one in fronts}
    seeds = sorted({seed for _, _, seed in values})
    rows: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(one["rival"] for one in fronts):
        line: dict[str, float] = {}
        for units in sorted({units for _, units, _ in values}):
            there = [seed for seed in seeds if (name, units, seed) in values]
            mine = [values[name, units, seed] for seed in there]
            if not mine:
                continue
            line[f"{units:g}"], line[f"± {units:g}"] = interval(mine)
            both = [seed for seed in there if (given.ours, units, seed) in values]
            if name != given.ours and both:
                apart = [values[given.ours, units, s] - values[name, units, s] for s in both]
                line[f"ours more by {units:g}"], line[f"± more {units:g}"] = interval(apart)
        rows[name] = {**line, "seeds": len({s for n, _, s in values if n == name})}
    settings = json.loads((given.out / "settings.json").read_text())
    report(
        "rivals_on",
        f"{given.name}: hypervolume on {len(fronts[0]['full']['marks'])} test examples, in percent "
        f"of the box, after so many units of {settings['unit']} accuracies of "
        f"{settings['examples']} examples; means over seeds with 95 % intervals",
        rows, save=given.save, result=f"rivals-{given.name}", settings=settings,
        device=", ".join(sorted({one["device"] for one in fronts})),
        command="python -m tests.benchmarks.rivals_on RUN TABLE OUT; "
        "python -m tests.benchmarks.rivals_table OUT",
    )  # fmt: skip


if __name__ == "__main__":
    main()
