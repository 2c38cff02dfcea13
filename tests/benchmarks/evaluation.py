"""What scoring by likelihood saves against generating answers one by one, and what it takes beside
the forward passes alone.

    python -m tests.benchmarks.evaluation RUN QUESTIONS [--save]

QUESTIONS is a JSONL file of multiple-choice questions in LLM-Adapters' form, such as arc_easy's
test set; RUN was trained on such (an untrained model rambles on, which would flatter us). Its
maximal sub-adapter scores questions of 1,000 in batches; the published protocol (four beams, up to
32 new tokens, one question at a time) takes turns with it on a few of them, and both are compared
per question. Then 60 of the questions are scored, beside the very forward passes of that, the one
over the common start included, called again with the same tensors; and in other ways that could be
faster: larger batches, bfloat16, norms and MLPs compiled.
"""

from __future__ import annotations

import argparse
import copy
import functools
import random
import statistics

import torch

from elastic.data import llm_adapters
from elastic.data.task import Example
from elastic.evaluation.evaluate import evaluate
from elastic.run import Run
from elastic.supernet.compact import compact
from elastic.supernet.store import load_run
from tests.benchmarks.common import report, sides

EXAMPLES, TURNS, SLOW, FAST = 1000, 5, 4, 100
BESIDE = 60
"""Questions whose scoring is held against its forward passes."""


def questions(file: str, count: int) -> list[Example]:
    return random.Random(0).sample(llm_adapters.read(file), count)


class Passes:
    """The forward passes of a module while this lasts, to be made again."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.calls: list[tuple[tuple, dict]] = []

    def __enter__(self) -> Passes:
        self._hook = self.module.register_forward_pre_hook(
            lambda module, args, kwargs: self.calls.append((args, kwargs)), with_kwargs=True
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    @torch.inference_mode()
    def again(self) -> None:
        """The same calls with the same tensors."""
        for args, kwargs in self.calls:
            self.module(*args, **kwargs)


def beside_passes(model, tokenizer, asked: list[Example]) -> dict[str, dict[str, float]]:
    """Milliseconds per question of scoring and of its forward passes alone."""

    def score() -> None:
        evaluate(model, tokenizer, asked, quiet=True)

    with Passes(model) as passes:
        score()
    found = sides(
        {"forward passes alone": passes.again, "forward passes again (control)": passes.again,
         f"scored, {len(asked)} questions": score},
        TURNS, baseline="forward passes alone",
    )  # fmt: skip
    return {
        name: {"ms_per_question": row["median_ms"] / len(asked), "ratio": row["ratio"]}
        for name, row in found.items()
    }


def compiled(model):
    """A copy with norms and MLPs compiled, each once for all lengths; attention, with its cache,
    would be compiled anew for every block."""
    model = copy.deepcopy(model)
    torch._dynamo.config.recompile_limit = 64
    for name, module in model.named_modules():
        if name.endswith(("norm", ".mlp")):
            module.compile(dynamic=True)
    return model


def other_ways(model, tokenizer, asked: list[Example]) -> dict[str, dict[str, float]]:
    """Milliseconds per question, each way beside the one that is used, in `model`'s own type."""
    narrow = copy.deepcopy(model)
    for parameter in narrow.parameters():  # buffers stay as they are: rotary frequencies
        parameter.data = parameter.data.to(torch.bfloat16)
    tried = {
        "as it is": (model, 2048),
        "as it is (control)": (model, 2048),
        "batches of 8,192 tokens": (model, 8192),
        "norms and MLPs compiled": (compiled(model), 2048),
        "bfloat16": (narrow, 2048),
        "bfloat16, compiled": (compiled(narrow), 2048),
    }
    found = sides(
        {
            name: functools.partial(
                evaluate, one, tokenizer, asked, batch_tokens=tokens, quiet=True
            )
            for name, (one, tokens) in tried.items()
        },
        TURNS,
        baseline="as it is",
    )
    return {
        name: {"ms_per_question": row["median_ms"] / len(asked), "ratio": row["ratio"]}
        for name, row in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("questions")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    _, base, net = load_run(Run(given.run))
    model, tokenizer = net.model, base.tokenizer
    asked = questions(given.questions, EXAMPLES)
    turn = {"scored": 0, "again (control)": 0, "generated": 0}

    def part(name: str, size: int) -> list[Example]:
        start = turn[name] * size % EXAMPLES
        turn[name] += 1
        return asked[start : start + size]

    def score(name: str) -> None:
        evaluate(model, tokenizer, part(name, FAST), quiet=True)

    answered: list[Example] = []
    generated: list[tuple[str, bool]] = []

    def generate() -> None:
        examples = part("generated", SLOW)
        found = evaluate(model, tokenizer, examples, beams=4, batch=1, quiet=True)
        answered.extend(examples)
        generated.extend(zip(found.said, found.correct, strict=True))

    found = sides(
        {
            "scored": lambda: score("scored"),
            "again (control)": lambda: score("again (control)"),
            "generated": generate,
        },
        TURNS,
        baseline="scored",
    )
    rows = {
        "scored, in batches": {
            "ms_per_question": found["scored"]["median_ms"] / FAST, "ratio": 1.0
        },
        "again (control)": {
            "ms_per_question": found["again (control)"]["median_ms"] / FAST,
            "ratio": found["again (control)"]["ratio"],
        },
        "generated, four beams, one by one": {
            "ms_per_question": found["generated"]["median_ms"] / SLOW,
            "ratio": found["generated"]["ratio"] * FAST / SLOW,
        },
        **beside_passes(model, tokenizer, asked[:BESIDE]),
        **other_ways(compact(net, net.space.maximal()), tokenizer, asked[:BESIDE]),
    }  # fmt: skip
    scored = evaluate(model, tokenizer, answered, quiet=True).correct
    same = statistics.mean(a == b for a, (_, b) in zip(scored, generated, strict=True))
    tokens = statistics.mean(len(tokenizer(text)["input_ids"]) for text, _ in generated)
    report(
        "evaluation",
        f"{FAST} questions of {EXAMPLES} scored and {SLOW} generated in each of {TURNS} turns; "
        f"answers of {tokens:.1f} tokens, judged alike in {same:.0%} of {len(scored)}",
        rows, save=given.save, command="python -m tests.benchmarks.evaluation RUN QUESTIONS",
    )  # fmt: skip


if __name__ == "__main__":
    main()
