"""Which slice of a folder that has every size meets a budget on this device.

Such a folder has a copy of this file, for `elastic.formats.any_size`, so nothing of this package is
imported here. `elastic.load` chooses by the same functions and never runs the copy.
"""

from __future__ import annotations

import math
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

FULL = "full"
"""The name of the size that nothing is cut of."""
LATENCIES = ("prefill_ms", "decode_ms")
OF_TIME = (*LATENCIES, "tokens_per_second")
"""Limits that a table of latencies is for."""
ACCURACIES = ("min_accuracy", "max_accuracy_drop")
LIMITS = (*OF_TIME, "memory_mb", "params", "macs", *ACCURACIES)
AT_LEAST = ("min_accuracy", "tokens_per_second")
ROUNDS = 5
"""In which the full size is timed where nothing is known of a device."""


class NotMet(ValueError):
    """No slice meets the budget."""


class NotKnown(ValueError):
    """A figure, or a slice, that the folder does not have."""


@dataclass(frozen=True)
class Timed:
    """Milliseconds of every slice on one device."""

    device: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    slices: Mapping[str, Mapping[str, float]]
    """prefill_ms and decode_ms, by slice."""

    def scaled(self, measured: Mapping[str, float], device: str) -> Timed:
        """On a device where the full model takes as long as was measured, were all slices to keep
        their share of it."""
        full = self.slices[FULL]
        factors = {key: measured[key] / full[key] if full[key] else 0.0 for key in measured}
        slices = {
            name: {key: timed[key] * factor for key, factor in factors.items()}
            for name, timed in self.slices.items()
        }
        return Timed(device, self.batch, self.prompt_tokens, self.new_tokens, slices)


def limits_of(budget: Any) -> dict[str, float | str]:
    """By their names; a limit alone is one of prefill. ValueError for what is none."""
    limits = dict(budget) if isinstance(budget, Mapping) else {"prefill_ms": budget}
    for name, value in limits.items():
        if name not in LIMITS:
            raise ValueError(f"budget: {name} is no limit; choose from {', '.join(LIMITS)}")
        try:
            number, is_share = _number(value)
        except ValueError:
            raise ValueError(
                f'budget.{name} is {value!r}; give a number, or a percentage such as "80%"'
            ) from None
        most = 1 if name in ACCURACIES else math.inf
        if not 0 < number <= most or number == math.inf:
            what = f"at most {'100%' if is_share else most}" if most == 1 else "finite"
            raise ValueError(f"budget.{name} is {value}; it must be positive and {what}")
    return limits


def _number(value: Any) -> tuple[float, bool]:
    """ "80%" is 0.8, a share."""
    match = re.match(r"^(\d+(?:\.\d+)?)\s*%$", str(value))
    return (float(match[1]) / 100, True) if match else (float(value), False)


def timed_here(
    tables: Sequence[Timed],
    limits: Mapping[str, float | str],
    device: str,
    measure: Callable[[Timed], Mapping[str, float]],
    where: str,
    say: Callable[[str], None],
) -> Timed | None:
    """What the slices take on this device: as measured here, else scaled by what the full model
    takes here, which `measure` tells of a table's shape; None where no latency is limited. Shares
    of the full model's are taken as they were measured elsewhere. NotKnown without any table."""
    limited = [name for name in limits if name in OF_TIME]
    if not limited:
        return None
    if not tables:
        raise NotKnown(
            f"{where}: budget.{limited[0]}: no latency is known of these slices; search the run, "
            "and export it again"
        )
    for table in tables:
        if table.device == device:
            return table
    table = tables[0]
    if all(_number(limits[name])[1] for name in limited):
        say(f"Latencies in parts of the full model's are those of {table.device}")
        return table
    found = measure(table)
    say(
        f"Not known on {device}: the full model took {found['prefill_ms']:.1f} ms of prefill and "
        f"{found['decode_ms']:.1f} ms a token just now, and the slices are believed to take their "
        f"share of that as on {table.device}"
    )
    return table.scaled(found, device)


def choose(
    slices: Mapping[str, Mapping[str, Any]],
    timed: Timed | None,
    limits: Mapping[str, float | str],
    where: str,
) -> str:
    """The most accurate slice within the budget, of equals the cheapest; the cheapest where
    accuracy alone is limited. NotMet names the nearest ones where there is none, NotKnown the
    figure that is missing."""
    known = {name: _figures(name, about, timed) for name, about in slices.items()}
    full = known.get(FULL, {})
    needed = ("min_accuracy" if name == "max_accuracy_drop" else name for name in limits)
    if missing := [name for name in needed if name not in full]:
        raise NotKnown(
            f"{where}: budget.{missing[0]}: that is not known of the full model; search the run, "
            "and export it again"
        )
    wanted = _absolute(limits, full)
    meeting = [
        name
        for name, has in known.items()
        if all(key in has and _met(key, has[key], limit) for key, limit in wanted.items())
    ]
    if not meeting:
        raise NotMet(_impossible(known, wanted, where))
    if set(wanted) == {"min_accuracy"}:
        return min(meeting, key=lambda name: _cost(known[name]))
    return max(meeting, key=lambda name: (_accuracy(known[name]), -_cost(known[name])))


def _absolute(limits: Mapping[str, float | str], full: Mapping[str, float]) -> dict[str, float]:
    """Shares are of the full model's; a drop of accuracy is one from the full model's."""
    whole = {**full, "max_accuracy_drop": full.get("min_accuracy", 0.0)}
    found = {}
    for name, value in limits.items():
        number, is_share = _number(value)
        found[name] = number * whole[name] if is_share else number
    if "max_accuracy_drop" in found:
        least = whole["max_accuracy_drop"] - found.pop("max_accuracy_drop")
        found["min_accuracy"] = max(least, found.get("min_accuracy", 0.0))
    return found


def _met(name: str, value: float, limit: float) -> bool:
    return value >= limit if name in AT_LEAST else value <= limit


def _figures(name: str, about: Mapping[str, Any], timed: Timed | None) -> dict[str, float]:
    """By the names of limits, as far as they are known."""
    found = {key: about[key] for key in ("params", "macs", "memory_mb") if key in about}
    if about.get("validation_estimate") is not None:
        found["min_accuracy"] = about["validation_estimate"]
    if timed and name in timed.slices:
        found |= {key: timed.slices[name][key] for key in LATENCIES}
        if found["decode_ms"]:
            found["tokens_per_second"] = 1e3 * timed.batch / found["decode_ms"]
    return found


def _accuracy(figures: Mapping[str, float]) -> float:
    """On validation examples: those of the test split choose nothing."""
    return figures.get("min_accuracy", 0.0)


def _cost(figures: Mapping[str, float]) -> float:
    return figures.get("prefill_ms", figures.get("params", 0.0))


def _impossible(
    known: Mapping[str, Mapping[str, float]], limits: Mapping[str, float], where: str
) -> str:
    def described(name: str) -> str:
        has = known[name]
        accuracy = f"{has['min_accuracy']:.1%} on validation, " if "min_accuracy" in has else ""
        speed = f"prefill {has['prefill_ms']:.1f} ms, " if "prefill_ms" in has else ""
        return f"{name} ({accuracy}{speed}{has['params'] / 1e6:.1f} M parameters)"

    wanted = ", ".join(f"{name} {limit:.4g}" for name, limit in limits.items())
    fastest = min(known, key=lambda name: _cost(known[name]))
    best = max(known, key=lambda name: _accuracy(known[name]))
    return (
        f"{where}: no slice meets the budget ({wanted}). The cheapest: {described(fastest)}. The "
        f"most accurate: {described(best)}."
    )


def best_of(index: Mapping[str, Any]) -> str:
    """What the search chose, else the full size."""
    best = (name for name, about in index["slices"].items() if about.get("best"))
    return next(best, FULL)


def tables_of(index: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Those of slices as they are loaded: merged, and run by torch."""
    for table in index["latencies"]:
        if table.get("runtime") == "torch" and table.get("merged", True):
            yield table


def device_name(device: str) -> str:
    """What a table calls it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else platform.machine()
    except OSError:
        processor = platform.processor() or platform.machine()
    return f"{device} ({processor}, {torch.get_num_threads()} threads)"


@torch.inference_mode()
def milliseconds(model: Any, timed: Timed) -> dict[str, float]:
    """Medians for a prompt of the table's shape, and for a further token."""
    shape, ids = (timed.batch, timed.prompt_tokens), torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.get_text_config().vocab_size, shape, generator=ids).to(
        model.device
    )
    decodes = timed.new_tokens > 0 and model.can_generate()

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        if decodes:
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, num_beams=1,
                min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
            ).cpu()  # fmt: skip
        else:
            model(prompt).logits.cpu()
        return time.perf_counter() - start

    more = 1 + timed.new_tokens
    seconds(more)
    first = [seconds(1) for _ in range(ROUNDS)]
    rest = [seconds(more) for _ in range(ROUNDS if decodes else 0)]
    decode = max(0.0, median(rest) - median(first)) / timed.new_tokens if decodes else 0.0
    return {"prefill_ms": 1e3 * median(first), "decode_ms": 1e3 * decode}
