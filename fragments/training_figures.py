"""Tables of what was trained: accuracy by width, by rule, by task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fragments.figures import percent, points, table

Found = Mapping[str, Any]
WIDTHS = ("1", "0.75", "0.625", "0.5")
FROM = {"first": ("first",), "plain": ("plain",), "full": ("full", "elastic full")}
"""What differences are taken from, and the words for it in the JSON."""


def widths(found: Found) -> str:
    """Accuracy at uniform widths; in brackets the differences that were saved."""
    rows = [
        [name, *(f"{percent(row[width])}{differences(row, width)}" if width in row else ""
                 for width in WIDTHS)]
        for name, row in found["rows"].items()
    ]  # fmt: skip
    return table(["width", *WIDTHS], rows)


def differences(row: Found, width: str) -> str:
    """From the first row and from its own full size, in points, each with its 95 % interval."""
    told = []
    for word in (name for names in FROM.values() for name in names):
        value = row.get(f"{width} - {word}")
        spread = row.get(f"± {width} - {word}", row.get(f"± {width}"))
        if value is not None and spread:
            named = " from full" if word.endswith("full") else ""
            told.append(f"{points(value)} ± {spread * 100:.1f}{named}")
    return f" ({'; '.join(told)})" if told else ""


def compensation(found: Found) -> str:
    """How much of what is cut is made up for, and what that is worth."""
    rows = [
        [width, *(percent(row[part]) for part in ("cut", "half", "all", "sequential")),
         f"{percent(row['chosen'])} ({points(row['chosen - cut'])} ± {row['± of that'] * 100:.1f} "
         "over cut)",
         f"{points(row['chosen - full'])} ± {row['± of this'] * 100:.1f}",
         f"{row['decided in s']:.0f} s, {row['fitted in s']:.0f} s"]
        for width, row in found["rows"].items()
        if "cut" in row
    ]  # fmt: skip
    full = percent(found["rows"]["1"]["full"])
    head = ["width", "cut", "half made up for", "all", "fitted on top of the best of these",
            "as held-out examples choose", "points from full", "to decide, to fit"]  # fmt: skip
    return f"{table(head, rows)}\n\nThe full model has {full}."


def continual(found: Found) -> str:
    """Average accuracy, backward transfer and forgetting; then what became of every task."""
    rows = []
    for name, row in found["rows"].items():
        order, _, method = name.partition(", ")
        tasks = found["orders"][int(order.split()[1]) - 1].strip("[]")
        cells = [tasks, {"lora": "LoRA", "olora": "O-LoRA"}[method]]
        parts = ("average", "backward transfer", "forgetting")
        rows.append([*cells, *(percent(row[part]) for part in parts)])
    told = table(["order", "method", "average accuracy", "backward transfer", "forgetting"], rows)
    return told + "".join(
        f"\n\nAccuracy of every task seen so far, {name.replace('olora', 'O-LoRA')}:\n\n"
        + matrix(found["matrices"][name])
        for name in found["matrices"]
        if name.endswith("olora")
    )


def matrix(found: Found) -> str:
    """A row after every task, a column for every task seen so far."""
    tasks = found["tasks"]
    rows = [
        [f"after {task}", *(percent(value, 0) for value in row), *[""] * (len(tasks) - len(row))]
        for task, row in zip(tasks, found["accuracy"], strict=True)
    ]
    return table(["", *tasks], rows)


def decisions(found: Found) -> str:
    """Test accuracy of what each rule would choose among none, half and all."""
    tasks = ("agnews", "sst2", "math")
    lines = []
    for name, row in found["rows"].items():
        if not name.endswith(", of three"):
            continue
        means = [
            sum(found_ := [value for key, value in row.items() if key.startswith(f"{task} ")])
            / len(found_)
            for task in tasks
        ]
        cells = [*(percent(mean) for mean in means), percent(row["mean"])]
        lines.append([name.removesuffix(", of three"), *cells])
    return table(["rule, examples that decide", *tasks, "mean"], lines)


def orders(found: Found) -> str:
    """What other orders of channels cost against that by activation."""
    rows = [
        [width, percent(row["activation"]),
         *(f"{percent(row[name])} ({points(row[f'{name} - activation'])} ± "
           f"{row[f'± {name}'] * 100:.1f})" for name in ("greedy", "pivoted"))]
        for width, row in found["rows"].items()
    ]  # fmt: skip
    return table(["width", "by activation", "brain surgeon (greedy)", "pivoted Cholesky"], rows)


def shown(found: Found) -> str:
    """Sub-adapters of one super-adapter beside plain LoRA."""
    runtimes = ("torch", "onnx", "openvino")
    rows = []
    for name, row in found["rows"].items():
        accuracy = (
            f"{percent(row['accuracy'])} ({percent(row['lowest'])} to {percent(row['highest'])})"
        )
        less = f"{points(row['- plain'])} ± {row['±'] * 100:.1f}" if row["±"] else ""
        costs = [percent(row[part], 0) for part in ("params", "macs", *runtimes)]
        rows.append([name, accuracy, less, *costs])
    controls = ", ".join(
        percent(max(row[f"{name} control"] for row in found["rows"].values())) for name in runtimes
    )
    head = ["", "accuracy", "− plain", "params", "MACs", "torch", "ONNX Runtime", "OpenVINO"]
    return f"{table(head, rows)}\n\nLargest A/A controls, in the order of the columns: {controls}."
