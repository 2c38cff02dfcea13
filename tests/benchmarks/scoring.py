"""What scoring by likelihood takes beside its forward passes alone, and other ways to make them.

    python -m tests.benchmarks.scoring RUN QUESTIONS [--save]

QUESTIONS is a JSONL file of multiple-choice questions in LLM-Adapters' form, such as arc_easy's
test set; RUN need not have learnt them. Of its maximal sub-adapter 60 questions are scored, beside
the very forward passes of that, the one over the common start included, called again with the same
tensors; and in ways that could be faster: larger batches, bfloat16, norms and MLPs compiled.
"""

from __future__ import annotations

import copy
import functools

import torch

from elastic.data.task import Example
from elastic.evaluation.evaluate import evaluate
from elastic.run import Run
from elastic.supernet.compact import compact
from elastic.supernet.store import load_run
from tests.benchmarks.common import report, sides
from tests.benchmarks.evaluation import TURNS, arguments, questions

BESIDE = 60
"""Questions."""


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


def per_question(found, count: int) -> dict[str, dict[str, float]]:
    """Milliseconds, and ratios as they are, of sides that had so many questions."""
    return {
        name: {"ms_per_question": row["median_ms"] / count, "ratio": row["ratio"]}
        for name, row in found.items()
    }


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
    return per_question(found, len(asked))


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
    return per_question(found, len(asked))


def main() -> None:
    given = arguments()
    _, base, net = load_run(Run(given.run), "float32")
    asked = questions(given.questions, BESIDE)
    tokenizer = base.tokenizer
    rows = {
        **beside_passes(net.model, tokenizer, asked),
        **other_ways(compact(net, net.space.maximal()), tokenizer, asked),
    }
    report(
        "scoring", f"{BESIDE} questions in each of {TURNS} turns, in float32 but where it is said",
        rows, save=given.save, command="python -m tests.benchmarks.scoring RUN QUESTIONS",
    )  # fmt: skip


if __name__ == "__main__":
    main()
