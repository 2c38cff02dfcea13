"""How often a model is right, on how many examples, and how sure that is."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from elastic.console import track
from elastic.data import llm_adapters
from elastic.data.answers import answer_logits, padding_is_seen
from elastic.data.collating import IGNORED, collate, length_sorted
from elastic.data.encoding import Encoded, Limits, encode_example, ends_of, placed, prompt_ids
from elastic.data.prefix import common_start, read
from elastic.data.task import Example, Judge
from elastic.evaluation.statistics import Score
from elastic.models.kinds import Kind, classes_of, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Row:
    """One sequence through the model, and the answers to an example that its logits tell of."""

    index: int
    """Of the example."""
    encoded: Encoded
    options: Sequence[tuple[bool, tuple[int, ...]]] = ()
    """Whether this one is the answer, and its tokens; empty where there is nothing to choose
    among."""


@dataclass(frozen=True)
class Verdict:
    """Of several on one example the first of the greatest value holds."""

    value: float
    right: bool = False
    said: str | None = None
    answered: bool | None = None
    """Of a generated text whether an answer was found in it."""


NEVER = Verdict(-math.inf)
"""On an example of which no option can be said: wrong."""


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_tokens: int = 2048,
    beams: int | None = None,
    batch: int = 8,
    label: str = "evaluating",
    quiet: bool = False,
) -> Score:
    """Share of examples answered right. Those that say how a text is judged, and have no options,
    are generated greedily; with `beams`, those with options too, with so many beams. The others are
    scored without generating anything, as are all of a classifier.
    """
    generated = [n for n, example in enumerate(examples) if is_generated(model, example, beams)]
    others = sorted(set(range(len(examples))) - set(generated))
    scored = _scored(
        model, tokenizer, [examples[number] for number in others], batch_tokens, label, quiet
    )
    found = dict(zip(others, scored, strict=True))
    judges = {n: judge for n in generated if (judge := examples[n].judge)}
    for new_tokens in sorted({judge.new_tokens for judge in judges.values()}):
        asked = [n for n, judge in judges.items() if judge.new_tokens == new_tokens]
        texts = answers(
            model, tokenizer, [examples[n] for n in asked], new_tokens=new_tokens,
            beams=beams or 1, batch=batch, label=label, quiet=quiet,
        )  # fmt: skip
        for number, text in zip(asked, texts, strict=True):
            found[number] = judged(judges[number], text)
    return score_of([found[number] for number in range(len(examples))])


def is_generated(model: nn.Module, example: Example, beams: int | None = None) -> bool:
    """Whether the text of an answer is judged; if not, the likelihood of what may be answered."""
    asked = example.judge and (beams or not example.options)
    return bool(asked) and kind_of(model) is not Kind.CLASSIFIER


def score_of(verdicts: Sequence[Verdict]) -> Score:
    """Of one verdict on each example."""
    said = tuple(each.said for each in verdicts)
    answered = [each.answered for each in verdicts if each.answered is not None]
    unanswered = answered.count(False) if answered else None
    return Score(tuple(each.right for each in verdicts), said if any(said) else (), unanswered)


@torch.inference_mode()
def _scored(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_tokens: int,
    label: str,
    quiet: bool,
) -> list[Verdict]:
    """On each example, without generating anything.

    An example without options counts when greedy generation would give exactly its answer and
    stop: that is so if and only if, fed the answer itself, the likeliest token at every position
    is the answer's next. With options it counts when the answer has the largest summed
    log-likelihood among them, the end of the sequence left out (`acc` of lm-eval, so an option that
    begins with another never beats it); options that differ in their last token alone share one
    sequence. A classifier is right when the answer is its likeliest class, a regression head when
    its number is within the example's tolerance. Batched and sorted by length, what all begin with
    read once; the result does not depend on `batch_tokens`.
    """
    device = next(model.parameters()).device
    limits, rows = Limits.of(model), []
    for index, example in track([*enumerate(examples)], "encoding examples", quiet=quiet):
        with placed(example):
            rows += rows_of(tokenizer, model, index, example)
            for ids in (rows[-1].encoded.source, rows[-1].encoded.ids):
                limits.require(ids)
    sequences = [row.encoded for row in rows]
    prefix = read(model, sequences)
    if prefix:
        sequences = [prefix.without(sequence) for sequence in sequences]
    found = [NEVER] * len(examples)
    classes = classes_of(model)
    batches = list(length_sorted(sequences, batch_tokens))
    for numbers, together in track(batches, label, quiet=quiet):
        batch = collate(together, tokenizer.pad_token_id)
        batch = {key: value.to(device) for key, value in batch.items()}
        logits, labels = answer_logits(model, batch, prefix=prefix)
        for number, *told in zip(numbers, logits, labels, strict=True):
            row = rows[number]
            new = verdict(row, examples[row.index], classes, *told)
            found[row.index] = max(found[row.index], new, key=lambda each: each.value)
    return found


def verdict(
    row: Row, example: Example, classes: Sequence[str], logits: Tensor, labels: Tensor
) -> Verdict:
    """What the logits (width, vocabulary) that predict a row's labels (width,) say of it; `classes`
    are those of the model."""
    if row.options:
        predictions = logits[labels != IGNORED].log_softmax(-1)
        values = [
            predictions[torch.arange(len(tokens)), list(tokens)].sum() for _, tokens in row.options
        ]
        value, best = torch.stack(values).max(0)
        return Verdict(float(value), row.options[int(best)][0])
    if labels.is_floating_point():
        number = float(logits[0, 0])
        off = abs(number - float(labels[0]))
        return Verdict(0.0, off <= example.tolerance, f"{number:.6g}")
    likeliest = logits.argmax(-1)
    said = classes[int(likeliest[0])] if classes else None
    return Verdict(0.0, bool(((likeliest == labels) | (labels == IGNORED)).all()), said)


def rows_of(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, index: int, example: Example
) -> list[Row]:
    """The fewest sequences whose logits tell of all options: one does for every option whose
    tokens but the last begin its own."""
    kind, options = kind_of(model), example.options
    if not options or kind is Kind.CLASSIFIER:
        options = (example.answer,)
    encoded = [encode_example(tokenizer, model, example, option) for option in options]
    if len(options) == 1:
        return [Row(index, encoded[0])]
    tokens = [each.answer_ids[:-1] for each in encoded]  # without the end of the sequence
    alike = 0
    if kind is not Kind.ENCODER_DECODER:
        # What all options begin with decides nothing: it counts as prompt.
        alike = min(common_start(tokens), max(map(len, tokens)) - 1)
    told: dict[int, list[tuple[bool, tuple[int, ...]]]] = {}
    longest = sorted(range(len(options)), key=lambda option: -len(tokens[option]))
    for option in longest:
        start, is_answer = tokens[option][:-1], options[option] == example.answer
        host = next((h for h in told if tokens[h][: len(start)] == start), option)
        told.setdefault(host, []).append((is_answer, tokens[option][alike:]))
    return [
        Row(index, replace(encoded[host], answer=encoded[host].answer - alike), each)
        for host, each in told.items()
    ]


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    new_tokens: int,
    beams: int = 1,
    batch: int = 32,
    label: str = "answering",
    quiet: bool = False,
) -> list[str]:
    """Continuations of at most `new_tokens` tokens, greedy or the best of `beams`, stripped, in the
    order of the examples; batched by length."""
    kind = kind_of(model)
    limits, ids = Limits.of(model), []
    for example in examples:
        with placed(example):
            ids.append(prompt_ids(tokenizer, example, model))
            limits.require(ids[-1], 0 if kind is Kind.ENCODER_DECODER else new_tokens)
    ends = {end for example in examples[:1] for end in ends_of(tokenizer, example, model)}
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    side = "right" if kind is Kind.ENCODER_DECODER else "left"
    if side == "left" and padding_is_seen(model):
        batch = 1
    groups = [order[start : start + batch] for start in range(0, len(order), batch)]
    found = [""] * len(examples)
    for rows in track(groups, label, quiet=quiet):
        padded = tokenizer.pad(
            {"input_ids": [ids[row] for row in rows]}, padding_side=side, return_tensors="pt"
        ).to(model.device)
        out = model.generate(
            **padded,
            max_new_tokens=new_tokens,
            num_beams=beams,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(ends),
            # Beams change places, which a state cannot follow.
            **({"use_cache": False} if kind is Kind.RECURRENT and beams > 1 else {}),
        )
        new = out if kind is Kind.ENCODER_DECODER else out[:, padded["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            found[row] = text.strip()
    return found


def judged(judge: Judge, text: str) -> Verdict:
    """On a generated text."""
    answer = llm_adapters.extract(judge.kind, text)
    right = llm_adapters.matches(judge.kind, answer, judge.expected)
    return Verdict(0.0, right, text, answer is not None)


def same_text(found: str, expected: str) -> bool:
    """Equal but for case, punctuation and spacing: the exact match of O-LoRA's benchmark."""
    plain = [
        " ".join("".join(c for c in text.lower() if c not in string.punctuation).split())
        for text in (found, expected)
    ]
    return plain[0] == plain[1]
