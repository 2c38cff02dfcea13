"""Memory and time of slicing, merging and writing a model of LLaMA-7B's shape.

    python -m tests.benchmarks.large FOLDER [--shard 2GB] [--format elastic] [--save]

Its bfloat16 weights are a sparse file of zeros below FOLDER (13 GB that no disk holds), mapped as
any others are; the factors are random. What is written, 11 or 14 GB, is deleted again. Memory is
the process's own (RssAnon), sampled a hundred times a second, over what it was before.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import threading
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from elastic.config import AdapterConfig, ExportConfig, HfConfig, ModelConfig, TrainConfig
from elastic.exporting.command import export
from elastic.models import loading
from elastic.models.digest import digest_of
from elastic.run import Run
from elastic.spaces.declared import SearchSpace
from elastic.supernet.store import save_super_adapter
from elastic.supernet.supernet import Supernet
from tests.benchmarks.common import report
from tests.helpers import tiny

SHAPE = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
             num_attention_heads=32, vocab_size=32000)  # fmt: skip


def sparse_model(folder: Path) -> None:
    """A folder that transformers loads, whose tensors are holes in a file."""
    config = LlamaConfig(**SHAPE, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in state.items():
        size = 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape),
                        "data_offsets": [end, end + size]}  # fmt: skip
        end += size
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def trained(base: Path, path: Path) -> Run:
    """A run whose super-adapter has random factors."""
    config = TrainConfig(run=str(path), model=ModelConfig(path=str(base), dtype="bfloat16"))
    run = Run(path)
    run.begin(config)
    net = Supernet(
        loading.skeleton(config.model, torch.bfloat16), SearchSpace.load("lonas-llama"),
        AdapterConfig(rank=32), start=False,
    )  # fmt: skip
    net.reorder(tiny.permutations(net))
    state = {name: 0.01 * torch.randn_like(tensor) for name, tensor in net.factor_state().items()}
    save_super_adapter(net, run.super_adapter, model=config.model, factors=state,
                       base_digest=digest_of(base))  # fmt: skip
    return run


class Memory(threading.Thread):
    """The most that this process alone held since it was started."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = _own()
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, _own())

    def stop(self) -> float:
        self._done.set()
        self.join()
        return self.peak - self.before


def _own() -> float:
    """MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shard", default="2GB")
    parser.add_argument("--format", choices=["hf", "elastic"], default="hf")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    base, place = given.folder / "llama-7b-shaped", given.folder / "llama-7b-run"
    sparse_model(base)
    run = trained(base, place)
    memory, start = Memory(), time.perf_counter()
    memory.start()
    made = export(ExportConfig(
        run=str(run.path), sub_adapter="heuristic", formats=[given.format], prove=False,
        hf=HfConfig(max_shard_size=given.shard),
    ))  # fmt: skip
    seconds, peak = time.perf_counter() - start, memory.stop()
    shards = sorted((made.directory / given.format).rglob("*.safetensors"))
    largest = max(file.stat().st_size for file in shards)
    what = "heuristic" if given.format == "hf" else "every size"
    rows = {what: {
        "written MB": sum(file.stat().st_size for file in shards) / 1e6, "files": len(shards),
        "largest file MB": largest / 1e6, "peak memory MB": peak, "seconds": seconds,
    }}  # fmt: skip
    shutil.rmtree(base)
    shutil.rmtree(place)
    name = "large" if given.format == "hf" else "large-every-size"
    report(
        name, "slicing, merging and writing a model of LLaMA-7B's shape, bfloat16", rows,
        save=given.save, command=f"python -m tests.benchmarks.large FOLDER --format {given.format}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
