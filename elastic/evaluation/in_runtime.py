"""How often a written model is right, asked in its own runtime, one request at a time.

The rules are those of `elastic.evaluation.evaluate`, which asks torch in batches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from elastic.console import track
from elastic.data.encoding import ends_of, prompt_ids
from elastic.data.task import Example
from elastic.evaluation.evaluate import NEVER, is_generated, judged, rows_of, score_of, verdict
from elastic.evaluation.statistics import Score
from elastic.formats.runner import Runner
from elastic.models.kinds import Kind, classes_of, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from elastic.evaluation.evaluate import Row, Verdict


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
    return score_of([_verdict(runner, model, tokenizer, each) for each in track(examples, label)])


def answer(
    runner: Runner,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    new_tokens: int,
) -> str:
    """What it says greedily in at most so many tokens; of a classifier the class, or the number."""
    if kind_of(model) is Kind.CLASSIFIER:
        return str(_verdict(runner, model, tokenizer, example).said)
    ids, ends = prompt_ids(tokenizer, example, model), ends_of(tokenizer, example, model)
    return continued(runner, tokenizer, ids, new_tokens, ends).strip()


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
        total += float(torch.from_numpy(logits).double().log_softmax(-1)[token])
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


def _verdict(
    runner: Runner, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example
) -> Verdict:
    """On one example, with as many steps as decide it."""
    if example.judge and is_generated(model, example):
        text = answer(runner, model, tokenizer, example, example.judge.new_tokens)
        return judged(example.judge, text)
    rows, classes = rows_of(tokenizer, model, 0, example), classes_of(model)
    # What no option is likelier than is wrong: a head may know the tokens of none.
    found = [NEVER, *(verdict(row, example, classes, *_told(runner, row)) for row in rows)]
    return max(found, key=lambda each: each.value)


def _told(runner: Runner, row: Row) -> tuple[Tensor, Tensor]:
    """A row's labels (width,) and before them their logits (width, vocabulary), in double
    precision, as far as they decide: where there are no options, to the first that is not the
    likeliest."""
    ids, types, length = row.encoded.ids, row.encoded.types, row.encoded.answer
    if row.encoded.label is not None:
        given = (np.array([types], np.int64),) if types else ()
        logits = runner.prefill(np.array([ids], np.int64), *given)
        return torch.from_numpy(logits).double(), torch.tensor([row.encoded.label])
    context, tail = row.encoded.source or ids[:-length], ids[len(ids) - length :]
    tail = tail[: max((len(tokens) for _, tokens in row.options), default=length)]
    told = []
    for logits, token in zip(predictions(runner, context, tail), tail, strict=True):
        told.append(logits)
        if not row.options and int(logits.argmax()) != token:
            break
    return torch.from_numpy(np.stack(told)).double(), torch.tensor(tail[: len(told)])
