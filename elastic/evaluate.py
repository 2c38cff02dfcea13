"""How often a model is right, on how many examples, and how sure that is."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from elastic.batching import IGNORED, answer_logits, collate, encode, length_sorted
from elastic.config import EvaluateConfig
from elastic.progress import track
from elastic.tasks.base import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Score:
    """Per-example results, in the order of the examples, so that two models can be compared on
    the same ones."""

    correct: tuple[bool, ...]

    @property
    def n(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval (Wilson 1927): sane at 0 and 1, unlike the normal one."""
        return wilson(sum(self.correct), self.n)

    def as_dict(self) -> dict[str, object]:
        return {
            "accuracy": self.accuracy,
            "accuracy_n": self.n,
            "accuracy_interval": list(self.interval),
        }

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.1%} [{low:.1%}, {high:.1%}] of {self.n}"


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval for a proportion of `right` in `n`; both bounds lie in [0, 1]."""
    p = right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_tokens: int = 2048,
    label: str = "evaluating",
    quiet: bool = False,
) -> Score:
    """Share of examples answered right, without generating anything.

    An example without options counts when greedy generation would give exactly its answer and
    stop: that is so if and only if, fed the answer itself, the likeliest token at every position
    is the answer's next. With options it counts when the answer has the largest summed
    log-likelihood among them (`acc` of lm-eval). Batched and sorted by length; the result does
    not depend on `batch_tokens`.
    """
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id
    encoder_decoder = model.config.is_encoder_decoder
    candidates = [
        (
            index,
            option == example.answer,
            encode(tokenizer, example.prompt, option, encoder_decoder=encoder_decoder),
        )
        for index, example in enumerate(examples)
        for option in (example.options or (example.answer,))
    ]
    exact: list[bool] = [False] * len(candidates)
    likelihood: list[float] = [0.0] * len(candidates)
    likelihoods = any(example.options for example in examples)
    batches = list(length_sorted([encoded for *_, encoded in candidates], batch_tokens))
    for rows, sequences in track(batches, label, quiet=quiet):
        batch = {key: value.to(device) for key, value in collate(sequences, pad).items()}
        hits, sums = _score(*answer_logits(model, batch), likelihoods=likelihoods)
        for row, hit, value in zip(rows, hits, sums, strict=True):
            exact[row], likelihood[row] = hit, value
    correct = [False] * len(examples)
    best = [-math.inf] * len(examples)
    for row, (index, is_answer, _) in enumerate(candidates):
        if not examples[index].options:
            correct[index] = exact[row]
        elif likelihood[row] > best[index]:
            best[index], correct[index] = likelihood[row], is_answer
    return Score(tuple(correct))


def _score(logits: Tensor, labels: Tensor, *, likelihoods: bool) -> tuple[list[bool], list[float]]:
    """Per row: whether every label is the likeliest token, and their summed log-probability."""
    counted = labels != IGNORED
    exact = ((logits.argmax(-1) == labels) | ~counted).all(1)
    if not likelihoods:
        return exact.tolist(), [0.0] * len(labels)
    log_probability = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return exact.tolist(), (log_probability * counted).sum(1).tolist()


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    new_tokens: int,
    batch: int = 32,
    label: str = "answering",
) -> list[str]:
    """Greedy continuations of at most `new_tokens` tokens, stripped, in the order of the prompts;
    batched by length."""
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    groups = [order[start : start + batch] for start in range(0, len(order), batch)]
    found = [""] * len(prompts)
    side = "right" if model.config.is_encoder_decoder else "left"
    for rows in track(groups, label):
        padded = tokenizer.pad(
            {"input_ids": [ids[row] for row in rows]}, padding_side=side, return_tensors="pt"
        ).to(model.device)
        out = model.generate(
            **padded,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = out if model.config.is_encoder_decoder else out[:, padded["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            found[row] = text.strip()
    return found


def same_text(found: str, expected: str) -> bool:
    """Equal but for case, punctuation and spacing: the exact match of O-LoRA's benchmark."""
    plain = [
        " ".join("".join(c for c in text.lower() if c not in string.punctuation).split())
        for text in (found, expected)
    ]
    return plain[0] == plain[1]


@dataclass(frozen=True)
class Evaluation:
    """What `elastic evaluate` found."""

    name: str
    split: str
    score: Score

    def show(self) -> None:
        print(f"{self.name} on {self.split}: {self.score}")
        print(json.dumps({"sub_adapter": self.name, "split": self.split, **self.score.as_dict()}))


def evaluate_run(config: EvaluateConfig) -> Evaluation:
    """`elastic evaluate`: one sub-adapter, active in the supernet, on one split."""
    from elastic.run import Run
    from elastic.tasks import load_task

    run = Run(config.run)
    trained = run.config()
    examples = getattr(load_task(trained.task, trained.seed), config.split)
    _, base, net = run.load()
    name, sub = run.resolve(config.sub_adapter, net.space, trained.seed)
    with net.active(sub) as model:
        score = evaluate(model, base.tokenizer, examples, batch_tokens=config.batch_tokens)
    return Evaluation(name, config.split, score)
