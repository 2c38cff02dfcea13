"""LoNAS's protocol on a real task: plain LoRA, the heuristic sub-adapter and a searched one.

    python -m tests.benchmarks.shown DATA RUNS [--task sst2|commonsense|math] [--seeds 0 1 2]
        [--save]

`plain` is LoRA (and the head) at full size for as many epochs; `maximal`, `heuristic` and
`searched` are of one super-adapter, the last the best that a search of 50 evaluations on validation
examples finds within the budget of prefill. Accuracy is on all test examples, latency (float32)
that of the sliced and merged model, in turns with the full one. Runs are kept and resumed.

commonsense: 600 rows of ARC, OpenBookQA and BoolQ in one, as LoNAS unifies them, in LLM-Adapters'
prompt; tested on 200 of each set and of Social IQa, which no row was taken from, by the likelihood
of the answers. math: the answer alone, right when greedy generation gives exactly it.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

from elastic import SearchConfig, TrainConfig
from elastic.config import TimingConfig
from elastic.config.parsing import parse
from elastic.data import load_task
from elastic.evaluation.evaluate import evaluate
from elastic.evaluation.statistics import Score
from elastic.files import read_json, write_json, write_text
from elastic.latency.bench import CANDIDATE, Bench, shape_of
from elastic.latency.runtime import timing_of
from elastic.run import Run
from elastic.searching.study import search
from elastic.spaces.bound import Candidate
from elastic.supernet.cost import Counter
from elastic.supernet.store import load_run
from elastic.training.one_task import train_one
from tests.benchmarks.common import report
from tests.benchmarks.quality import difference

PLAIN = '--stages=[{"epochs": 3}]'
RUNTIMES = ("torch", "onnx", "openvino")
POSITION = ["--task.draw", "position"]
"""The rows of figures that were measured before the seed drew them."""
SMOLLM2 = ["--lr.base_lr", "5e-4", "--lr.warmup_epochs", "0.1", "--save_steps", "20",
           "--space", "llama"]  # fmt: skip
TASKS = {  # model, settings of the task, those of the search
    "sst2": (
        "minilm",
        ["--task.name", "jsonl", "--task.train", "{data}/continual/sst2.train.jsonl",
         "--task.test", "{data}/continual/sst2.test.jsonl", "--task.prompt", "{{sentence}}",
         "--task.answer", "label", "--task.train_examples", "1600",
         "--task.validation_examples", "400", "--task.test_examples", "872",
         "--model.dtype", "float32", *POSITION],
        ["--budget.prefill_ms", "70%"],
    ),
    "commonsense": (
        "smollm2",
        ["--task.name", "llm_adapters", "--task.train", "{runs}/commonsense.train.jsonl",
         "--task.test", "{runs}/commonsense.test.jsonl", "--task.train_examples", "600",
         "--task.validation_examples", "200", "--task.test_examples", "1000", *POSITION,
         *SMOLLM2],
        ["--budget.prefill_ms", "80%", "--timing.runtime", "onnx", "--timing.new_tokens", "6"],
    ),
    "math": (
        "smollm2",
        ["--task.name", "jsonl", "--task.train", "{data}/math/train.jsonl",
         "--task.test", "{data}/math/mawps.test.jsonl", "--task.answer", "answer",
         "--task.prompt", "{{instruction}}\nAnswer:", "--task.train_examples", "1344",
         "--task.validation_examples", "400", "--task.test_examples", "1000", *POSITION,
         *SMOLLM2],
        ["--budget.prefill_ms", "80%", "--timing.runtime", "onnx", "--timing.new_tokens", "6"],
    ),
}  # fmt: skip
PLAINLY = {"maximal": "plain"}
SUB_ADAPTERS = {"maximal": "maximal", "heuristic": "heuristic", "best": "searched"}
"""What is shown of a run, and as what."""
LEARNT = ("arc_easy", "arc_challenge", "openbookqa", "boolq")
ASKED = (*LEARNT, "social_i_qa")


def unify(data: Path, runs: Path) -> None:
    """Rows of all sets in one file, shuffled; of the tests as many of each."""
    for split, sets in (("train", LEARNT), ("test", ASKED)):
        rows = []
        for name in sets:
            lines = (data / "commonsense" / f"{name}.{split}.jsonl").read_text().splitlines()
            random.Random(name).shuffle(lines)
            rows += lines if split == "train" else lines[:200]
        random.Random(split).shuffle(rows)
        write_text(runs / f"commonsense.{split}.jsonl", "\n".join(rows) + "\n")


def trained(data: Path, folder: Path, task: str, kind: str, seed: int) -> Run:
    model, settings, _ = TASKS[task]
    return train_one(parse(TrainConfig, [
        "--run", str(folder / f"{task}-{kind}-{seed}"), "--model.path", model,
        "--seed", str(seed),
        *(setting.format(data=data, runs=folder) for setting in settings),
        *([PLAIN] if kind == "plain" else []),
    ]))  # fmt: skip


def searched(run: Run, task: str, seed: int, *more: str) -> None:
    if run.front.is_file():
        return
    settings = [str(run.path), *TASKS[task][2], "--seed", str(seed), *more]
    search(parse(SearchConfig, settings)).show()


def scored(run: Run, names: Sequence[str]) -> dict[str, dict]:
    """Accuracy and sizes of sub-adapters of a run, from RUN/shown.json where they stand."""
    file = run.path / "shown.json"
    found = read_json(file) if file.is_file() else {}
    if set(names) <= set(found):
        return found
    config, base, net = load_run(run)
    examples, count = load_task(config.task, config.seed).test, Counter(net.model, net.space)
    for name in names:
        sub = run.resolve(name, net.space)[1]
        with net.active(sub) as model:
            score = evaluate(model, base.tokenizer, examples, label=name)
        cost, full = count(sub), count.full
        found[name] = {
            "correct": list(score.correct), "params": cost.params / full.params,
            "macs": cost.macs / full.macs,
        }  # fmt: skip
        write_json(file, found)
    return found


def timed(run: Run, names: Sequence[str], file: Path) -> dict[str, dict]:
    """Latencies beside the full model's by name and runtime. `file` keeps them by shape, for
    seeds do not change how fast one is."""
    config, _, net = load_run(run, dtype="float32")
    known = read_json(file) if file.is_file() else {}
    subs = {name: run.resolve(name, net.space)[1] for name in names}
    shapes = {name: str(shape_of(net.space, sub, merged=True)) for name, sub in subs.items()}
    for runtime in RUNTIMES:
        timing = timing_of(TimingConfig(runtime=runtime, rounds=10, new_tokens=0), config.model)
        with Bench(net, timing) as bench:
            for name, sub in subs.items():
                if runtime not in known.setdefault(shapes[name], {}):
                    measured = bench(Candidate(sub))
                    ratio = measured.ratios[CANDIDATE].prefill_ms
                    known[shapes[name]][runtime] = {"prefill": ratio, "control": measured.control}
                    write_json(file, known)
    return {name: known[shape] for name, shape in shapes.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--task", choices=TASKS, default="sst2")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    if given.task == "commonsense":
        given.runs.mkdir(parents=True, exist_ok=True)
        unify(given.data, given.runs)
    found: dict[str, list[dict]] = {}
    runs: list[tuple[Run, dict[str, str]]] = []
    for seed in given.seeds:
        runs.append((trained(given.data, given.runs, given.task, "plain", seed), PLAINLY))
        run = trained(given.data, given.runs, given.task, "super", seed)
        searched(run, given.task, seed)
        runs.append((run, SUB_ADAPTERS))
    for run, names in runs:
        scored(run, list(names))
    file = given.runs / f"latency-{TASKS[given.task][0]}.json"
    for run, names in runs:  # all together, so that a quiet machine is needed once
        each, latencies = scored(run, list(names)), timed(run, list(names), file)
        for name, shown in names.items():
            found.setdefault(shown, []).append({**each[name], "latency": latencies[name]})
    scores = {name: [Score(tuple(one["correct"])) for one in each] for name, each in found.items()}
    rows = {}
    for name, each in found.items():
        accuracies = [score.accuracy for score in scores[name]]
        mean, half = difference(scores[name], scores["plain"])
        rows[name] = {
            "accuracy": statistics.mean(accuracies), "lowest": min(accuracies),
            "highest": max(accuracies), "- plain": mean, "±": half,
            "params": statistics.mean(one["params"] for one in each),
            "macs": statistics.mean(one["macs"] for one in each),
        }  # fmt: skip
        for runtime in RUNTIMES:
            latencies = [one["latency"][runtime] for one in each]
            rows[name] |= {
                runtime: statistics.mean(one["prefill"] for one in latencies),
                f"{runtime} control": max(one["control"] for one in latencies),
            }
    model, _, asked = TASKS[given.task]
    n = scores["plain"][0].n
    report(
        "shown",
        f"{given.task}, {model}, seeds {given.seeds}, accuracy on n = {n} test examples with the "
        f"paired difference from plain; params, MACs and prefill as parts of the full model's; "
        f"searched: 50 evaluations, {' '.join(asked)}",
        rows, save=given.save, result=f"shown-{given.task}",
        command=f"python -m tests.benchmarks.shown DATA RUNS --task {given.task}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
