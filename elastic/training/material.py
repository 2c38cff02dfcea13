"""The examples of a run: read, encoded and told of before weights load, and held against what the
run began with."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from elastic import distributed
from elastic.config import TrainConfig
from elastic.console import say
from elastic.data import digest, load_task
from elastic.data.encoding import (
    Encoded,
    Limits,
    encode_all,
    encode_example,
    most_tokens,
    placed,
)
from elastic.data.labels import check_classes, untrained
from elastic.data.task import SPLITS, Split, Task
from elastic.data.vocabulary import TokenOrder, token_order
from elastic.errors import BaseMismatch, ConfigError, ModelError
from elastic.files import read_json, write_json
from elastic.models import loading
from elastic.models.digest import digest_of
from elastic.run import Run
from elastic.supernet.examples import require_same

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONG = 4
"""Times the median from which the longest example is worth a word."""
SHOWN = 400
"""Characters of either end of a long example."""


@dataclass(frozen=True)
class Material:
    """The examples of every split, and what the model reads of them."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    encoded: Mapping[Split, list[Encoded]]

    @classmethod
    def of(cls, config: TrainConfig, skeleton: PreTrainedModel) -> Material:
        """By the settings of a run, for a model that needs no weights; DataError names the example
        that cannot be read, and ModelError a tokenizer that does not belong to the model."""
        task = load_task(config.task, config.seed)
        if config.model.classes:
            check_classes(task, config.model.classes)
        tokenizer = loading.load_tokenizer(config.model)
        limits = Limits.of(skeleton)
        if limits.tokens is not None and tokenizer.pad_token_id >= limits.tokens:
            raise ModelError(
                f"model.path {config.model.path}: its tokenizer pads with {tokenizer.pad_token!r}, "
                f"token {tokenizer.pad_token_id}, and the embedding has {limits.tokens} rows; take "
                "a padding token that is among them, such as the one that ends a sequence"
            )
        encoded = {split: encode_all(tokenizer, task.split(split), skeleton) for split in SPLITS}
        for example in (*task.validation, *task.test):
            if example.options and not config.model.classes:
                with placed(example):
                    longest = max(example.options, key=len)
                    limits.require(encode_example(tokenizer, skeleton, example, longest).ids)
        return cls(task, tokenizer, encoded)

    def token_order(
        self, config: TrainConfig, skeleton: PreTrainedModel, vocabulary: int, first: Iterable[int]
    ) -> TokenOrder:
        """Of what the head may do without; `first` always stay."""
        return token_order(
            self.tokenizer, skeleton, self.task.train, self.encoded["train"], vocabulary,
            text=config.vocab.text, first=first,
        )  # fmt: skip

    def require_sayable(self, kept: Tensor) -> None:
        """ConfigError where a head that computes these tokens alone, (kept,) int64, cannot say all
        training answers."""
        known, encoded = set(kept.tolist()), self.encoded["train"]
        cannot = sum(not known.issuperset(one.answer_ids) for one in encoded)
        if cannot:
            raise ConfigError(
                f"sub_adapter: {cannot} of {len(encoded)} training answers have tokens that the "
                f"head of this one, of {len(known)}, does without; choose one that has all tokens, "
                "or leave sub_adapter out"
            )

    @functools.cached_property
    def digests(self) -> dict[str, Any]:
        """What is kept of it."""
        splits = digest.of_texts(self.task)
        for split, encoded in self.encoded.items():
            splits[split]["tokens"] = digest.of_tokens(encoded)
        tokenizer = digest.of_tokenizer(self.tokenizer, self.task.has_chat)
        return {"splits": splits, "tokenizer": tokenizer}

    def require_same(self, run: Run) -> None:
        """RunError when the run began with other examples, or with a tokenizer of another kind; one
        of an earlier version does not know."""
        require_same(run, lambda _: self.digests, ", or choose another --run")

    def keep(self, run: Run, base_digest: str) -> None:
        """Write what the run begins with; BaseMismatch if it began with another base."""
        if not run.data.is_file() and distributed.is_main():
            write_json(run.data, {**self.digests, "base": base_digest})
        require_base(run, base_digest)

    def tell(self, skeleton: PreTrainedModel) -> None:
        """Say how many rows are used, what one looks like, and what may surprise."""
        if drawn := self.task.drawn():
            say(f"Examples: {drawn}")
        if missing := untrained(self.task):
            say(f"Warning: {missing}")
        encoded = self.encoded["train"]
        longest = max(range(len(encoded)), key=lambda number: encoded[number].length)
        tokens, half = encoded[longest].length, median(one.length for one in encoded)
        if encoded[0].label is not None:
            limit = most_tokens(skeleton, self.tokenizer)
            if full := sum(len(one.ids) == limit for one in encoded):
                say(f"{full} of {len(encoded)} texts fill the {limit} tokens that the model reads; "
                    "what they have beyond is cut")  # fmt: skip
        elif tokens >= LONG * half:
            where = self.task.train[longest].where
            say(f"The longest training example{where and f' ({where})'} has {tokens:,} tokens, half"
                f" have {half:,.0f} at most; task.cutoff shortens prompts")  # fmt: skip
        first = encoded[0]
        text = self.tokenizer.decode([*first.source, *first.ids])
        if len(text) > 2 * SHOWN:
            text = f"{text[:SHOWN]} [...] {text[-SHOWN:]}"
        say("The first training example, as the model reads it:")
        for line in text.split("\n"):
            say(f"  | {line}")


def require_base(run: Run, base_digest: str) -> None:
    """BaseMismatch if the run began with another base."""
    before = read_json(run.data).get("base") if run.data.is_file() else None
    if before not in (None, base_digest):
        raise BaseMismatch(
            f"{run.path} began on a base with {before}, the one given has {base_digest}; pass the "
            "model it began with, or choose another --run"
        )


def require_unmoved(run: Run, config: TrainConfig) -> None:
    """Hold a finished run against its data and base, and keep where they are now; RunError names
    what is not as it was."""
    material = Material.of(config, loading.skeleton(config.model))
    material.require_same(run)
    if config.model.path != run.begun().model.path:
        require_base(run, digest_of(loading.locate(config.model.path)))
    run.move(config)
