"""How long `elastic train --dry_run` takes for models that no laptop holds, at their real sizes.

    python -m tests.benchmarks.giants [NAME ...]

Only their config.json is written, of transformers' own classes and with the published sizes, and a
tokenizer of letters. The last line is JSON; it is kept in results/giants.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers

from elastic.files import write_json
from tests.helpers import tiny

MOST = 20.0
"""Seconds, imports and all."""
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


def dry_run(folder: Path) -> tuple[float, dict[str, Any]]:
    """Seconds of a process of its own, and what it found."""
    command = [sys.executable, "-m", "elastic", "train", "--dry_run", "--space", "auto"]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--model.path", str(folder)], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    print(done.stderr, file=sys.stderr)
    done.check_returncode()
    return seconds, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    names = sys.argv[1:] or list(GIANTS)
    rows = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            seconds, found = dry_run(folder_of(name, Path(directory)))
            rows[name] = {
                "seconds": round(seconds, 1),
                "parameters": found["parameters"],
                "groups": sum(row["groups"] for row in found["space"]),
                "notes": found["notes"],
            }
            print(f"{name}: {seconds:.1f} s, {found['parameters'] / 1e9:.1f} B parameters")
    print(json.dumps(rows))
    if len(names) == len(GIANTS):
        write_json(Path(__file__).parent / "results" / "giants.json", rows)
    if slow := [name for name, row in rows.items() if row["seconds"] > MOST]:
        raise SystemExit(f"slower than {MOST:g} s: {', '.join(slow)}")


if __name__ == "__main__":
    main()
