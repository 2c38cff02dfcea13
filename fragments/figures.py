"""Tables of what was timed, weighed and searched, each from the JSON that its benchmark wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Found = Mapping[str, Any]
RUNTIMES = {"torch": "torch", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: float, digits: int = 1) -> str:
    """A share in percent."""
    return f"{value * 100:.{digits}f}%"


def points(value: float, digits: int = 1) -> str:
    """A difference of two shares, in points and with its sign."""
    return f"{value * 100:+.{digits}f}"


def scored(row: Found) -> str:
    """An accuracy with its interval and the number of examples."""
    low, high = row["accuracy_interval"]
    return (
        f"{percent(row['accuracy'])} ({percent(low)} to {percent(high)}, n = {row['accuracy_n']:,})"
    )


def demo(found: Found) -> str:
    """The front, then every file that was written of the best one."""
    rows = []
    for one in found["front"]:
        name = f"**{one['name']}** (best)" if one["best"] else one["name"]
        times = [
            f"{one[part]:.0f}, {one['measured'][part]:.0f} ms, "
            + percent(one["measured"][part] / one[f"full_{part}"], 0)
            for part in ("prefill_ms", "decode_ms")
        ]
        made_up = percent(one["compensation"]["degree"], 0)
        size = f"{one['params'] / 1e6:.1f} M, {percent(one['params'] / one['full_params'], 0)}"
        rows.append([name, scored(one), less(one), made_up, *times, size])
    front = table(
        ["sub-adapter", "test accuracy (95 % interval)", "points from the full model, paired",
         "of what is cut, made up for", "prefill: predicted, measured",
         "decode: predicted, measured", "parameters"], rows,
    )  # fmt: skip
    rows = [
        [
            name,
            f"{one['bytes'] / 1e6:.0f} MB",
            f"{one['prefill_ms']:.0f} ms ({one['full_prefill_ms']:.0f}), {faster(one, 'prefill')}",
            f"{one['decode_ms']:.0f} ms ({one['full_decode_ms']:.0f}), {faster(one, 'decode')}",
            f"{percent(one['accuracy'])} ({percent(one['full_accuracy'])}), "
            f"n = {one['accuracy_n']}",
            f"{one['max_abs_diff']:.0e} of {one['largest_logit']:.0f}",
            percent(one["control"]),
        ]
        for name, one in found["report"]["formats"].items()
        if "skipped" not in one
    ]
    written = table(
        ["written", "size", "prefill (full model)", "decode (full model)", "accuracy (full model)",
         "largest logit difference", "A/A control"], rows,
    )  # fmt: skip
    return f"{front}\n\n{written}\n\n{minutes(found['seconds'])}"


def faster(one: Found, part: str) -> str:
    """How many times as fast as the full model, with its interval."""
    low, high = one[f"{part}_ratio_interval"]
    return f"{1 / one[f'{part}_ratio']:.2f}x [{1 / high:.2f}, {1 / low:.2f}]"


def minutes(seconds: Mapping[str, float]) -> str:
    """What every step of the demo took."""
    parts = ", ".join(f"{step} {value / 60:.1f}" for step, value in seconds.items())
    return f"Minutes: {parts}; {sum(seconds.values()) / 60:.1f} in all."


def compact(found: Found) -> str:
    """Speed-ups by runtime, precision and mean width."""
    rows = []
    for name in dict.fromkeys(name.rpartition(", ")[0] for name in found["rows"]):
        runtime, _, precision = name.partition(", ")
        wide, narrow = (found["rows"][f"{name}, {width}"] for width in ("0.75", "0.5"))
        cells = [
            f"{one[part]:.2f} ({percent(one[f'{part} reached'], 0)})"
            for one in (wide, narrow)
            for part in ("prefill", "decode")
        ]
        rows.append([f"{RUNTIMES[runtime]}, {precision}", *cells, percent(wide["control"])])
    return table(["", "0.75: prefill", "decode", "0.5: prefill", "decode", "A/A control"], rows)


def eighty(found: Found) -> str:
    """The best sub-adapter at 80 % of the prefill, beside the full model."""
    rows = [
        [name, percent(one["full"]), percent(one["best"]),
         f"{points(one['difference'])} [{points(one['low'])}, {points(one['high'])}], "
         f"n = {one['n']:,}"]
        for name, one in found["rows"].items()
    ]  # fmt: skip
    return table(["task", "full", "best", "points from full"], rows)


def vocabulary(found: Found) -> str:
    """The full model, its head cut alone, and the best without and with the vocabulary as a
    dimension, in every runtime."""
    rows = []
    for name, one in found["rows"].items():
        model, _, runtime = name.rpartition(", ")
        said = f"{one['tokens']:,}"
        if one["unsayable"]:
            said += (
                f" ({percent(one['share'])} of the answers' tokens, {one['unsayable']:,} unsayable)"
            )
        full = model == "full"
        cells = [
            f"{one[f'{part}_ms']:.1f} ms" + ("" if full else f", {faster(one, part)}")
            for part in ("prefill", "decode")
        ]
        memory = one["memory_mb"]
        rows.append(
            [f"{model}, {RUNTIMES[runtime]}", said, scored(one), "" if full else less(one),
             *cells, "" if memory is None else f"{memory:,.0f} MB", percent(one["control"])]
        )  # fmt: skip
    heads = ["", "tokens of the head", "accuracy (95 % interval)", "points from full, paired",
             "prefill, speed-up", "decode, speed-up", "memory", "A/A control"]  # fmt: skip
    return f"{table(heads, rows)}\n\n{''.join(against(found['rows']))}"


def less(one: Found, which: str = "difference") -> str:
    """A difference in points with its interval."""
    low, high = one[f"{which}_interval"]
    return f"{points(one[which])} ({points(low)} to {points(high)})"


def against(rows: Mapping[str, Found]) -> Iterable[str]:
    """What the dimension is worth within the same budget, in a line for every runtime."""
    for name, one in rows.items():
        if "from_without" in one:
            other = rows[name.replace("best with", "best without")]
            speed = other["decode_ratio"] / one["decode_ratio"]
            yield (
                f"- {RUNTIMES[name.rpartition(', ')[2]]}: the best with the dimension is "
                f"{less(one, 'from_without')} points from the best without, n = "
                f"{one['accuracy_n']:,}, and decodes {speed:.2f} times as fast.\n"
            )


def fronts(found: Found) -> str:
    """Two searches, compared by the hypervolume of their fronts."""
    rows = [
        [name, f"{one['hypervolume']:.3g}",
         f"{percent(one['least accurate'], 0)} at {one['from_ms']:.0f} ms to "
         f"{percent(one['most accurate'], 0)}" if "members" in one else ""]
        for name, one in found["rows"].items()
    ]  # fmt: skip
    return table(["search, evaluations", "hypervolume", "front"], rows)


def large(found: Found) -> str:
    """What it takes to write a model larger than memory."""
    rows = [
        [name, f"{one['written MB'] / 1e3:.1f} GB", str(one["files"]),
         f"{one['largest file MB'] / 1e3:.1f} GB", f"{one['peak memory MB'] / 1e3:.1f} GB",
         f"{one['seconds']:.0f} s"]
        for name, one in found["rows"].items()
    ]  # fmt: skip
    return table(["sub-adapter", "written", "files", "largest", "peak memory", "time"], rows)


def activation(found: Found) -> str:
    """Time to make a sub-adapter active, by number of groups."""
    rows = [[name, f"{one['median_ms']:.3f} ms"] for name, one in found["rows"].items()]
    return table(["groups of the space", "activating a sub-adapter"], rows)


def options(found: Found) -> str:
    """Options of a training step, as ratios to the same step without them."""
    rows = found["rows"]
    eager = rows["eager, the same again"]["median_ms"]
    lines = []
    for name, one in rows.items():
        ratio = one.get("ratio") or one["median_ms"] / (
            rows["eager, a new sub-adapter"]["median_ms"] if "new" in name else eager
        )
        memory = f"{one['peak_memory']:.2f}" if "peak_memory" in one else ""
        lines.append([name, f"{one['median_ms']:,.0f} ms", f"{ratio:.2f}", memory])
    return table(["step", "median", "time, ratio", "peak memory, ratio"], lines)


def precisions(found: Found) -> str:
    """A front of sizes and precisions, in parts of the full model in float32."""
    rows = [
        [name.rpartition(", ")[2], percent(one["params"], 0), scored(one),
         *(percent(one[part], 0) for part in ("memory", "prefill", "decode", "predicted decode"))]
        for name, one in found["rows"].items()
    ]  # fmt: skip
    errors = "; ".join(
        f"{name} {percent(one['prefill_ms'])} and {percent(one['decode_ms'])}"
        for name, one in found["table_errors"].items()
    )
    control = max(one["control"] for one in found["rows"].values())
    head = ["weights", "params", "accuracy", "memory", "prefill", "decode", "decode, predicted"]
    return (
        f"{table(head, rows)}\n\nMean errors of the tables on sub-adapters that they never saw, "
        f"prefill and decode: {errors}. Largest A/A control: {percent(control)}."
    )


def serving(found: Found) -> str:
    """Servers of one size and of the size that the queue asks for."""
    rows = [
        [name, f"{one['median_ms']:,.0f} ms", f"{one['p95_ms'] / 1e3:.1f} s",
         f"{percent(one['accuracy'])} [{percent(one['low'])}, {percent(one['high'])}]",
         percent(one["at full size"], 0)]
        for name, one in found["rows"].items()
    ]  # fmt: skip
    head = ["server", "median from arrival to answer", "95 % within", "right", "at full size"]
    return f"{table(head, rows)}\n\nTo change the size takes {found['resize_ms']:.2f} ms."


def simulated(found: Found) -> str:
    """Hypervolume after 50, 100 and 200 evaluations, in two simulated spaces."""
    after = ("after 50", "after 100", "after 200")
    samplers = dict.fromkeys(
        name.partition(": ")[2] for name in found["rows"] if not name.startswith("proposing")
    )
    rows = [
        [name, *(" / ".join(f"{found['rows'][f'{space}: {name}'][part]:.0f}" for part in after)
                 for space in ("lonas", "richer"))]
        for name in samplers
    ]  # fmt: skip
    times = ", ".join(
        f"{name.partition(', ')[2]}: {one['median_ms']:.0f} ms"
        for name, one in found["rows"].items()
        if name.startswith("proposing")
    )
    head = ["% of a near-ideal hypervolume after 50 / 100 / 200", "LoNAS's space", "a richer one"]
    return f"{table(head, rows)}\n\nTime to propose one sub-adapter: {times}."


def step(found: Found) -> str:
    """A training step against plain PEFT LoRA, and where it grows."""
    rows = [
        [name, *(f"{one[part]:.2f}" for part in ("ratio", "operations", "over_operations",
                                                  "peak_memory"))]
        for name, one in found["rows"].items()
        if not name.endswith(": peft")
    ]  # fmt: skip
    against = table(
        ["step against plain PEFT LoRA", "seconds", "operations", "seconds over operations",
         "peak memory beside the weights"], rows,
    )  # fmt: skip
    parts = ("peft again (control)", "maximal", "uniform draws", "minimal")
    rows = [
        [name, f"{one['peft_ms']:.0f} ms", *(f"{one[part]:.2f}" for part in parts)]
        for name, one in found["growth"].items()
    ]
    growth = table(["seconds over operations", "PEFT step", *parts], rows)
    return f"{against}\n\n{growth}"


def stress(found: Found) -> str:
    """What was found after kills; all but the first and the last are to be 0."""
    parts = ("kills", "lost", "doubled", "left", "unequal", "failed", "torn")
    rows = [[name, *(str(one[part]) for part in parts)] for name, one in found["rows"].items()]
    head = ["command", "kills", "results lost", "done twice", "files left behind",
            "unequal results", "failed", "journals with a torn line, repaired"]  # fmt: skip
    return table(head, rows)


def tables(found: Found) -> str:
    """Error and rank correlation of latency tables."""
    rows = [
        [f"{RUNTIMES[name]}, {found['targets'][name]['device'].partition(',')[0]})",
         *(f"{percent(one[f'{part} error'], 2 if 'memory' in part else 1)}, "
           f"{one[f'{part} ranks']:.2f}" for part in ("prefill_ms", "decode_ms", "memory_mb")),
         percent(one["control"])]
        for name, one in found["rows"].items()
    ]  # fmt: skip
    head = ["mean error, rank correlation", "prefill", "decode", "memory", "A/A control"]
    return table(head, rows)


def tenants(found: Found) -> str:
    """Several tasks on one base: times and memory."""
    rows = found["rows"]
    return table(
        ["two tasks on one base", "measured"],
        [
            ["another size of the same task", f"{rows['size within a task']['ms']:.2f} ms"],
            ["another task", f"{rows['task']['ms']:.0f} ms"],
            ["weights in memory", f"{rows['weights in memory']['mb']:,.0f} MB"],
            ["weights as two models", f"{rows['weights in memory']['mb alone']:,.0f} MB"],
            ["loading", f"{rows['loading']['s']:.1f} s"],
        ],
    )
