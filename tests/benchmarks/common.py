"""Interleaved timing with an A/A control, and results as a table and JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from elastic.provenance import provenance

TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
"""PEFT's names for the layers that the llama space adapts."""
RESULTS = Path(__file__).parent / "results"


def llama(layers: int, hidden: int = 576, intermediate: int | None = None, vocabulary: int = 1024):
    """A random Llama in SmolLM2's proportions."""
    intermediate = intermediate or hidden * 8 // 3 // 64 * 64
    torch.manual_seed(0)
    heads = hidden // 64
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=3 if heads % 3 == 0 else heads,
        head_dim=64,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], repetitions: int, warmups: int = 1
) -> dict[str, list[float]]:
    """Seconds of each candidate, taking turns; every round in the opposite order of the last."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(warmups):
        for run in candidates.values():
            run()
    names = list(candidates)
    for repetition in range(repetitions):
        for name in names if repetition % 2 else reversed(names):
            start = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"median_ms": median * 1e3, "iqr_ms": (high - low) * 1e3, "n": len(seconds)}


def sides(
    candidates: Mapping[str, Callable[[], Any]], repetitions: int, baseline: str
) -> dict[str, dict[str, float]]:
    """Medians, and the ratio to the baseline: the median over rounds of the ratio within one, so
    that a machine that slows down for a while slows both sides."""
    seconds = interleaved(candidates, repetitions)
    return {
        name: {
            **summary(found),
            "ratio": statistics.median(
                mine / other for mine, other in zip(found, seconds[baseline], strict=True)
            ),
        }
        for name, found in seconds.items()
    }


def report(
    name: str,
    description: str,
    rows: Mapping[str, Any],
    *,
    save: bool | None = None,
    result: str | None = None,
    **values: Any,
) -> None:
    """Print a table and a line of JSON; `--save` keeps the JSON in results/."""
    if save is None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--save", action="store_true", help="keep the figures in results/")
        save = parser.parse_args().save
    print(description)
    for row, values_ in rows.items():
        shown = ", ".join(
            f"{key} {item:.4g}" if isinstance(item, float) else f"{key} {item}"
            for key, item in values_.items()
        )
        print(f"  {row:<28} {shown}")
    found = {
        "benchmark": name,
        "description": description,
        "command": f"python -m tests.benchmarks.{name}",
        "date": datetime.date.today().isoformat(),
        "rows": rows,
        **provenance("cpu" if not torch.cuda.is_available() else "cuda:0"),
        **values,
    }
    print(json.dumps(found))
    if save:
        (RESULTS / f"{result or name}.json").write_text(json.dumps(found, indent=2) + "\n")
