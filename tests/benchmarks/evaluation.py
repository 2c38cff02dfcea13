"""What scoring by likelihood saves against generating answers one by one.

    python -m tests.benchmarks.evaluation RUN QUESTIONS [--save]

QUESTIONS is a JSONL file of multiple-choice questions in LLM-Adapters' form, such as arc_easy's
test set; RUN was trained on such (an untrained model rambles on, which would flatter us). Its
maximal sub-adapter scores questions of 1,000 in batches; the published protocol (four beams, up to
32 new tokens, one question at a time) takes turns with it on a few of them, and both are compared
per question.
"""

from __future__ import annotations

import argparse
import random
import statistics

from elastic.data import llm_adapters
from elastic.data.task import Example
from elastic.evaluation.evaluate import evaluate
from elastic.run import Run
from elastic.supernet.store import load_run
from tests.benchmarks.common import report, sides

EXAMPLES, TURNS, SLOW, FAST = 1000, 5, 4, 100


def questions(file: str, count: int) -> list[Example]:
    return random.Random(0).sample(llm_adapters.read(file), count)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("questions")
    parser.add_argument("--save", action="store_true")
    return parser.parse_args()


def main() -> None:
    given = arguments()
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
