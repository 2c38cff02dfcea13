"""What scoring by likelihood saves against generating answers one by one.

    python -m tests.benchmarks.evaluation RUN QUESTIONS [--save]

QUESTIONS is a JSONL file of multiple-choice questions in LLM-Adapters' form, whose answers end in
answer1 to answer5. The maximal sub-adapter of RUN scores questions of 1,000 in batches; the
published protocol (four beams, up to 32 new tokens, one question at a time) takes turns with it on
a few of them, and both are compared per question.
"""

from __future__ import annotations

import argparse
import json
import random

import torch

from elastic.evaluate import evaluate
from elastic.protocol import labels_in
from elastic.run import Run
from elastic.tasks import Example
from tests.benchmarks.common import report, sides

EXAMPLES, TURNS, SLOW, FAST = 1000, 5, 4, 100


def questions(file: str, count: int) -> list[Example]:
    with open(file, encoding="utf-8") as lines:
        rows = random.Random(0).sample([json.loads(line) for line in lines], count)
    found = []
    for row in rows:
        prompt = f"{row['instruction']}\n\nResponse:"
        names = labels_in("answer", row["instruction"])
        options = tuple(f"the correct answer is {name}" for name in names)
        found.append(Example(prompt, f"the correct answer is {row['answer']}", options))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("questions")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    _, base, net = Run(given.run).load()
    model, tokenizer = net.model, base.tokenizer
    asked = questions(given.questions, EXAMPLES)
    turn = {"scored": 0, "again (control)": 0, "generated": 0}

    def part(name: str, size: int) -> list[Example]:
        start = turn[name] * size % EXAMPLES
        turn[name] += 1
        return asked[start : start + size]

    def score(name: str) -> None:
        evaluate(model, tokenizer, part(name, FAST), quiet=True)

    def generate() -> None:
        for example in part("generated", SLOW):
            ids = tokenizer(example.prompt, return_tensors="pt")
            with torch.inference_mode():
                model.generate(
                    **ids, num_beams=4, max_new_tokens=32, do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip

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
    report(
        "evaluation",
        f"{FAST} questions of {EXAMPLES} scored and {SLOW} generated in each of {TURNS} turns",
        rows, save=given.save, command="python -m tests.benchmarks.evaluation RUN QUESTIONS",
    )  # fmt: skip


if __name__ == "__main__":
    main()
