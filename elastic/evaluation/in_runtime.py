"""How often a written model is right, asked in its own runtime, one request at a time.

The rules are those of `elastic.evaluation.evaluate`, which asks torch in batches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from elastic.console import track
from elastic.data.encoding import encode_example, encode_text, prompt_ids
from elastic.data.task import Example
from elastic.evaluation.evaluate import judged, rows_of
from elastic.evaluation.statistics import Score
from elastic.formats.runner import Runner
from elastic.models.kinds import classes_of, is_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def score(
    runner: Runner,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    label: str = "scoring",
) -> Score:
    """Share of examples that `runner` answers right; of `model`, which it runs in some form, only
    the kind is asked."""
    correct: list[bool] = []
    said: list[str | None] = []
    unanswered = None
    for example in track(examples, label):
        text = None
        if classes_of(model):
            right, text = _classified(runner, model, tokenizer, example)
        elif example.judge and not example.options:
            text = answer(runner, model, tokenizer, example, example.judge.new_tokens)
            right, found = judged(example.judge, text)
            unanswered = (unanswered or 0) + (not found)
        else:
            right = _scored(runner, model, tokenizer, example)
        correct.append(right)
        said.append(text)
    return Score(tuple(correct), tuple(said) if any(said) else (), unanswered)


def answer(
    runner: Runner,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    new_tokens: int,
) -> str:
    """What it says greedily in at most so many tokens; of a classifier the class, or the number."""
    if classes_of(model):
        return _classified(runner, model, tokenizer, example)[1]
    ends = {tokenizer.eos_token_id}
    return continued(runner, tokenizer, prompt_ids(tokenizer, example), new_tokens, ends).strip()


def predictions(
    runner: Runner, context: Sequence[int], continuation: Sequence[int]
) -> Iterator[np.ndarray]:
    """Logits (vocabulary,) before each token of a continuation, float32 or wider; a step is taken
    when its logits are asked for."""
    yield runner.prefill(np.array([context], np.int64))[0]
    for token in continuation[:-1]:
        yield runner.decode(np.array([[token]], np.int64))[0]


def likelihood(
    runner: Runner, context: Sequence[int], continuation: Sequence[int]
) -> tuple[float, bool]:
    """Log-likelihood of the continuation, and whether greedy generation would say it."""
    total, greedy = 0.0, True
    rows = predictions(runner, context, continuation)
    for logits, token in zip(rows, continuation, strict=True):
        total += float(_log_softmax(logits)[token])
        greedy = greedy and int(logits.argmax()) == token
    return total, greedy


def continued(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    new_tokens: int,
    ends: Collection[int],
    stops: Sequence[str] = (),
) -> str:
    """The greedy continuation up to a token of `ends`, a stop string or so many tokens."""
    said: list[int] = []
    logits = runner.prefill(np.array([ids], np.int64))[0]
    while (token := int(logits.argmax())) not in ends:
        said.append(token)
        text = tokenizer.decode(said, skip_special_tokens=True) if stops else ""
        if len(said) >= new_tokens or any(stop in text for stop in stops):
            break
        logits = runner.decode(np.array([[token]], np.int64))[0]
    text = tokenizer.decode(said, skip_special_tokens=True)
    return min((text.split(stop)[0] for stop in stops if stop), key=len, default=text)


def _classified(
    runner: Runner, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example
) -> tuple[bool, str]:
    """Whether the likeliest class is the answer, or the number near enough, and which it is."""
    text, classes = encode_text(tokenizer, model, example), classes_of(model)
    types = (np.array([text.types], np.int64),) if text.types else ()
    logits = runner.prefill(np.array([text.ids], np.int64), *types)[0]
    label = encode_example(tokenizer, model, example).label
    if is_number(classes):  # in the precision in which the examples' tensors are compared
        right = abs(logits[0] - np.float32(label)) <= np.float32(example.tolerance)
        return bool(right), f"{float(logits[0]):.6g}"
    best = int(logits.argmax())
    return best == label, classes[best]


def _scored(
    runner: Runner, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example
) -> bool:
    """Whether greedy generation would say the answer and stop, or the answer is the likeliest of
    the options."""
    best, right = -np.inf, False
    for row in rows_of(tokenizer, model, 0, example):
        ids, length = row.encoded.ids, row.encoded.answer
        context, tail = row.encoded.source or ids[:-length], ids[len(ids) - length :]
        if not row.options:
            rows = predictions(runner, context, tail)
            return all(int(row.argmax()) == token for row, token in zip(rows, tail, strict=True))
        tail = tail[: max(len(tokens) for _, tokens in row.options)]
        logs = [_log_softmax(logits) for logits in predictions(runner, context, tail)]
        for is_answer, tokens in row.options:
            value = sum(log[token] for log, token in zip(logs, tokens, strict=False))
            if value > best:
                best, right = value, is_answer
    return right


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
