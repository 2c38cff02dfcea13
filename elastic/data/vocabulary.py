"""Which tokens a task needs, and in which order a head may do without the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elastic.data.encoding import Encoded, encode_example, placed
from elastic.data.task import Example
from elastic.errors import ConfigError, DataError, DataMissing
from elastic.plain import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LINES = 1000
"""Of a text that are tokenised together."""


@dataclass(frozen=True)
class TokenOrder:
    """Of a whole vocabulary."""

    tokens: Tensor
    """(vocabulary,) int64, those that are kept longest first."""
    least: int
    """How many of the first always stay."""


def token_order(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    vocabulary: int,
    *,
    text: str | None = None,
    first: Iterable[int] = (),
) -> TokenOrder:
    """Of the training examples, `encoded` with their answers: what is always kept comes first, by
    number, then the others by how often the file `text`, then prompts and answers have them, then
    by number.

    Always kept are `first`, the tokens of all answers and options, with what ends them, and those
    that end a sequence. ConfigError for generated answers without a text: training shows some of
    them alone.
    """
    if text is None and any(each.judge and not each.options for each in examples):
        raise ConfigError(
            "dim vocab: the answers of this task are texts that are generated, of which training "
            "shows some alone; name a text that has the words they may need, --vocab.text FILE, "
            "or leave the group out of the space"
        )
    needed = {*first, *_ends(tokenizer, model)}
    for example, one in zip(examples, encoded, strict=True):
        needed.update(one.answer_ids)
        for option in example.options:
            needed.update(_answer(tokenizer, model, example, option))
    own = Counter(token for one in encoded for token in (*one.source, *one.ids))
    asked = Counter[int]() if text is None else _counted(tokenizer, text)
    rest = sorted(set(range(vocabulary)) - needed, key=lambda t: (-asked[t], -own[t], t))
    kept = sorted(token for token in needed if token < vocabulary)
    return TokenOrder(torch.tensor([*kept, *rest]), len(kept))


def _ends(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> set[int]:
    """What may end a generated sequence."""
    config = model.config.get_text_config()
    named = [tokenizer.eos_token_id, config.eos_token_id]
    if model.can_generate() and model.generation_config is not None:
        named.append(model.generation_config.eos_token_id)
    lists = (each if isinstance(each, list) else [each] for each in named if each is not None)
    return {int(token) for each in lists for token in each}


def _answer(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, example: Example, answer: str
) -> tuple[int, ...]:
    with placed(example):
        return encode_example(tokenizer, model, example, answer).answer_ids


def _counted(tokenizer: PreTrainedTokenizerBase, file: str) -> Counter[int]:
    """How often a text has each token; DataError for a file without any."""
    if not Path(file).is_file():
        raise DataMissing(f"vocab.text {file}: no such file; give a text in UTF-8")
    whole = read_text(file, DataError)
    if not whole.strip():
        raise DataError(f"vocab.text {file}: there is no text in it; give one to count tokens of")
    lines = whole.splitlines(keepends=True)
    found = Counter[int]()
    for start in range(0, len(lines), LINES):
        text = lines[start : start + LINES]
        for ids in tokenizer(text, add_special_tokens=False)["input_ids"]:
            found.update(ids)
    return found


@dataclass(frozen=True)
class Sayable:
    """What a head that knows some tokens alone can say of the answers to some examples."""

    tokens_known: int
    vocabulary: int
    answer_tokens: int
    answer_tokens_known: int
    answers: int
    unsayable: int
    """Answers with a token that is cut: no model with this head gives them. Of generated texts that
    are judged, another text may still be right."""

    @property
    def share(self) -> float:
        """Of the answers' tokens, those that it knows, in [0, 1]."""
        return self.answer_tokens_known / max(self.answer_tokens, 1)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.tokens_known:,} of {self.vocabulary:,} tokens: {self.share:.1%} of those in "
            f"the {self.answers} test answers, {self.unsayable} of which cannot be said"
        )


def sayable(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    examples: Sequence[Example],
    kept: Tensor,
    vocabulary: int,
) -> Sayable:
    """By a head that computes these tokens, (kept,) int64, of so many."""
    known = set(kept.tolist())
    total = there = unsayable = 0
    for example in examples:
        tokens = _answer(tokenizer, model, example, example.answer)
        found = sum(token in known for token in tokens)
        total, there = total + len(tokens), there + found
        unsayable += found < len(tokens)
    return Sayable(len(known), vocabulary, total, there, len(examples), unsayable)
