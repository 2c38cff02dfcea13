"""How long `elastic train --dry_run` takes for models that no laptop holds, at their real sizes.

    python -m tests.benchmarks.giants [--save] [--only NAME ...]

Only their config.json is written, of transformers' own classes and with the published sizes, and a
tokenizer of letters. `seconds` are of a process of its own, imports and all, on a machine that may
be busy; `of_a_processor` is what it took of one, in one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers

from tests.benchmarks.common import report
from tests.helpers import tiny

MOST = 20.0
"""Seconds of one processor."""
LFM2 = ["conv", "conv", "full_attention"] * 3 + ["conv", "full_attention"] * 3 + ["conv"]
GIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # published sizes, where the defaults are others
    "Mixtral-8x7B": ("MixtralConfig", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768}),
    "Qwen3-30B-A3B": ("Qwen3MoeConfig", {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "max_position_embeddings": 40960}),
    "DeepSeek-V3": ("DeepseekV3Config", {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "max_position_embeddings": 163840}),
    "LFM2-1.2B": ("Lfm2Config", {
        "vocab_size": 65536, "hidden_size": 2048, "intermediate_size": 12288,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "layer_types": LFM2}),
}  # fmt: skip


def folder_of(name: str, directory: Path) -> Path:
    """A folder without weights: configuration and tokenizer."""
    kind, sizes = GIANTS[name]
    config = getattr(transformers, kind)(**sizes, dtype="bfloat16")
    config.architectures = [kind.removesuffix("Config") + "ForCausalLM"]
    config.save_pretrained(directory / name)
    tiny.tokenizer().save_pretrained(directory / name)
    return directory / name


def dry_run(folder: Path) -> dict[str, Any]:
    """What a process of its own took, and what it found."""
    command = [sys.executable, "-m", "elastic", "train", "--dry_run", "--space", "auto"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [*command, "--model.path", str(folder)], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(done.stderr, file=sys.stderr)
    done.check_returncode()
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "seconds": round(seconds, 1),
        "of_a_processor": round(
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1
        ),
        "billion_parameters": round(found["parameters"] / 1e9, 1),
        "groups": sum(row["groups"] for row in found["space"]),
        "notes": "; ".join(found["notes"]) or "none",
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    parser.add_argument("--only", nargs="+", choices=GIANTS, default=list(GIANTS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = {name: dry_run(folder_of(name, Path(directory))) for name in given.only}
    description = "elastic train --dry_run --space auto of models at their published sizes"
    report("giants", description, rows, save=given.save)
    if slow := [name for name, row in rows.items() if row["of_a_processor"] > MOST]:
        raise SystemExit(f"slower than {MOST:g} s: {', '.join(slow)}")


if __name__ == "__main__":
    main()
