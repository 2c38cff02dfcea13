"""What an export wrote as nemotron_nas, run by mlx-lm beside what it wrote as hf, run by torch.

    python -m tests.programs.in_mlx [RUN/export/NAME]   (minutes: makes an environment of its own)

Without an export it makes one, of SmolLM2 as it is, cut to a random sub-adapter. `read` runs in
that environment, as a file, where nothing of this project is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "Tom has 3 apples and buys 4 more. Now he has",
)
NEW_TOKENS = 24
PACKAGES = ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")


def made(below: Path) -> Path:
    """An export of blocks of several sizes; three quarters of the width at least, so that there is
    something to say."""
    import random

    from elastic.__main__ import main
    from elastic.files import write_json
    from elastic.run import Run
    from elastic.supernet.store import load_run

    run, few = below / "run", "--task.train_examples 32 --task.validation_examples 8"
    main([
        "train", "--run", str(run), "--adapter.from", "none", "--model.path", "smollm2",
        "--model.dtype", "float32", "--space", "llama-deep", "--order_examples", "8",
        "--compensation_examples", "8", "--task.test_examples", "8", *few.split(),
    ])  # fmt: skip
    space, generator = load_run(Run(run))[2].space, random.Random(1)
    chosen = {group.name: group.choices[0] for group in space}
    for group in space:
        if group.dim == "width":
            chosen[group.name] = generator.choice(group.choices[:3])
        if group.dim == "depth" or (group.dim == "query_heads" and generator.random() < 0.2):
            chosen[group.name] = group.choices[1]
    write_json(below / "uneven.json", chosen)
    main([
        "export", str(run), "--sub_adapter", str(below / "uneven.json"), "--name", "uneven",
        "--formats", "[hf, nemotron_nas]", "--accuracy", "false", "--runtime_examples", "0",
        "--weigh", "false",
    ])  # fmt: skip
    return run / "export" / "uneven"


def write(export: Path, folder: Path) -> None:
    """Of every prompt its tokens, the logits of all of them, and the greedy continuation, by torch
    in float32."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from elastic.formats import hf

    model = hf.load(export / "hf", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(export / "hf", trust_remote_code=True)
    logits, told = {}, []
    for number, text in enumerate(PROMPTS):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits[str(number)] = model(input_ids=ids, use_cache=False).logits[0].contiguous()
            long = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        answer = long[0, ids.shape[1] :].tolist()
        told.append({"ids": ids[0].tolist(), "answer": answer, "text": tokenizer.decode(answer)})
    save_file(logits, folder / "logits.safetensors")
    (folder / "told.json").write_text(json.dumps(told))


def read(export: Path, folder: Path) -> None:
    """Compare with this interpreter's mlx-lm; AssertionError names what differs."""
    from importlib.metadata import version

    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    trusted = {"trust_remote_code": True}  # else transformers asks, for the sake of the config
    model, tokenizer = load(str(export / "nemotron_nas"), tokenizer_config=trusted)
    model.set_dtype(mx.float32)
    expected = mx.load(str(folder / "logits.safetensors"))
    for number, told in enumerate(json.loads((folder / "told.json").read_text())):
        ids, truth = told["ids"], expected[str(number)]
        assert tokenizer.encode(PROMPTS[number]) == ids, PROMPTS[number]
        gap = mx.abs(model(mx.array([ids]))[0] - truth).max() / mx.abs(truth).max()
        steps = generate_step(mx.array(ids), model, max_tokens=NEW_TOKENS)
        answer = [int(token) for token, _ in steps][: len(told["answer"])]
        equal = sum(a == b for a, b in zip(answer, told["answer"], strict=True))
        print(f"{gap.item():.1e} of the largest logit, {equal} of {len(answer)} tokens equal: "
              f"{PROMPTS[number]}{tokenizer.decode(answer)!r}")  # fmt: skip
        assert gap.item() < 1e-4 and answer == told["answer"], told["text"]
    name = type(model).__module__
    print(f"{name} of mlx-lm {version('mlx-lm')}, mlx {version('mlx')}, {mx.default_device()}")


def environment(below: Path) -> Path:
    """The interpreter of an environment with mlx-lm."""
    python = below / "bin" / "python"
    if not python.exists():
        venv.create(below, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python


def check(export: Path, below: Path) -> str:
    """What reading prints; RuntimeError with what it said if it fails."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        write(export, Path(folder))
        done = subprocess.run(
            [environment(below), Path(__file__), str(export), folder],
            env=clean | {"HF_HUB_OFFLINE": "1"}, cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{done.stdout}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    if len(sys.argv) > 2:
        read(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        cache = Path(os.environ.get("ELASTIC_CACHE", tempfile.gettempdir())) / "mlx"
        with tempfile.TemporaryDirectory() as scratch:
            exported = Path(sys.argv[1]) if sys.argv[1:] else made(Path(scratch))
            print(check(exported.resolve(), cache), end="")
