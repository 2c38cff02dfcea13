"""What data a run is made from: digests by which a change is told, split by split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from elastic.data.encoding import Encoded
from elastic.data.task import SPLITS, Example, Split, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NOTHING = asdict(Example("", ""))


def of_texts(task: Task) -> dict[Split, dict[str, Any]]:
    """By split: how many examples, where from, and the digest of all that they say."""
    found: dict[Split, dict[str, Any]] = {}
    for split in SPLITS:
        examples = [asdict(example) for example in task.split(split)]
        said = [
            # What later versions add does not change the digest of examples that are without.
            {k: v for k, v in example.items() if v != _NOTHING[k] and k != "where"}
            for example in examples
        ]
        source = task.sources.get(split)
        found[split] = {
            "examples": len(examples), "from": str(source) if source else None,
            "texts": of_value(said),
        }  # fmt: skip
    return found


def of_tokens(encoded: Sequence[Encoded]) -> str:
    """Of everything that a model reads of these examples."""
    return of_value([[e.ids, e.answer, e.source, e.types, e.label] for e in encoded])


def of_tokenizer(tokenizer: PreTrainedTokenizerBase, chat: bool) -> dict[str, Any]:
    """Of its vocabulary with the special tokens, and of its chat template where that is used."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    found = {"vocabulary": of_value([sorted(tokenizer.get_vocab().items()), special])}
    return {**found, "chat_template": of_value(tokenizer.chat_template)} if chat else found


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was: of `splits` (`of_texts`, perhaps with `tokens`) and `tokenizer`, as
    far as both tell of it."""
    found = []
    for split, mine in now.get("splits", {}).items():
        theirs = {**mine, **before.get("splits", {}).get(split, {})}
        if theirs["texts"] != mine["texts"]:
            there, here = theirs["examples"], mine["examples"]
            what = f"{there:,} then, {here:,} now" if there != here else f"{here:,} others"
            of = f" of {mine['from']}" if mine["from"] else ""
            found.append(f"the {split} examples{of} ({what})")
        elif mine.get("tokens", theirs.get("tokens")) != theirs.get("tokens"):
            found.append(f"the tokens that the {split} examples become")
    known, mine = before.get("tokenizer", {}), now.get("tokenizer", {})
    for name in known:
        if mine.get(name, known[name]) != known[name]:
            found.append(f"the {name.replace('_', ' ')} of the tokenizer")
    return found


def of_value(value: Any) -> str:
    """Of what JSON can say, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
