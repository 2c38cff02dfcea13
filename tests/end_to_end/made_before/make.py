"""Makes this folder: a run, a study and an export. Run at commit 047a0a6, the last before the move
into packages, from an empty folder with that checkout on the path:

    PYTHONPATH=CHECKOUT python make.py
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.tiny_runs import move_factors, space_file

from elastic.__main__ import main
from elastic.run import Run
from tests import tiny

TIMING = [
    "--timing.prompt_tokens", "4", "--timing.new_tokens", "1",
    "--timing.rounds", "1", "--timing.max_rounds", "1",
]  # fmt: skip


def rows(first: int, last: int) -> str:
    return "".join(
        json.dumps({"q": f"{n} and {n % 7}", "answer": "yes" if n % 3 else "no"}) + "\n"
        for n in range(first, last)
    )


tiny.save_tiny("base")
space_file(Path("."))
for name, first, last in (("train", 0, 32), ("validation", 32, 48), ("test", 48, 64)):
    Path(f"{name}.jsonl").write_text(rows(first, last))
assert main([
    "train", "run", "--model.path", "base", "--model.dtype", "float32", "--model.device", "cpu",
    "--space", "tiny-space.yaml", "--adapter.rank", "8", "--adapter.alpha", "24",
    "--task.name", "jsonl", "--task.train", "train.jsonl", "--task.validation", "validation.jsonl",
    "--task.test", "test.jsonl", "--task.prompt", "{q}:", "--task.answer", "answer",
    "--batch_size", "8",
]) == 0  # fmt: skip
run = Run("run")
move_factors(run)
assert main(["search", "run", "--trials", "8", "--starts", "4", "--objectives", "accuracy,params",
             "--test_front", "3", *TIMING]) == 0  # fmt: skip
assert main(["export", "run", "--sub_adapter", "heuristic", "--formats", "hf,peft,onnx,openvino",
             *TIMING]) == 0  # fmt: skip

_, base, net = run.load()
expected = {"ids": tiny.tokens(2, 6)}
with torch.no_grad():
    for name in ("maximal", "minimal", "heuristic", "best"):
        with net.active(run.resolve(name, net.space)[1]) as model:
            logits = model(input_ids=expected["ids"], use_cache=False).logits
            expected[name] = logits.clone()
save_file(expected, "expected.safetensors")
for drawn in ("report.html", "front.png"):  # megabytes of a plotting library, and a picture
    (run.search / drawn).unlink()
