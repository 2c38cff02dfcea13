"""Byte-level BPE tokenizers in GGUF, and Gemma's, which is one of SentencePiece's.

llama.cpp splits text by code of its own, one variant per family of tokenizers, and a file names the
variant. Which one a tokenizer is, its own description in tokenizer.json says: how it splits before
pairs are merged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
"""Regular expressions of published tokenizers (Llama 3's and Qwen 2's)."""


def why_not(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The reason llama.cpp would split text otherwise; None if it does the same."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return "a tokenizer without tokenizer.json; byte-level BPE ones are written"
    described = json.loads(backend.to_str())
    if _is_gemmas(described):
        return None
    if described["model"]["type"] != "BPE" or described["model"].get("byte_fallback"):
        kind = described["model"]["type"]
        return (
            f"a tokenizer of type {kind} as SentencePiece makes them; byte-level BPE ones, and "
            "Gemma's, are written. llama.cpp's convert_hf_to_gguf.py reads those from a uniform "
            "or padded hf folder with the base model's tokenizer.model beside it"
        )
    if _variant(described) is None:
        splitter = json.dumps(described["pre_tokenizer"])
        return (
            f"the tokenizer splits text in a way that is not known to be one of llama.cpp's: "
            f"{splitter[:200]}"
        )
    return None


def write(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Tokens, merges, special tokens and chat template. `size`: rows of the embedding, of which a
    tokenizer may use fewer."""
    from gguf import TokenType

    described = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {entry["id"]: entry["special"] for entry in described["added_tokens"]}
    pieces = _is_gemmas(described)
    tokens, types = [], []
    for number in range(size):
        tokens.append(names.get(number, f"[PAD{number}]"))
        if number not in names:
            types.append(TokenType.UNUSED)
        elif number in added:
            types.append(TokenType.CONTROL if added[number] else TokenType.USER_DEFINED)
        elif pieces and _BYTE.fullmatch(tokens[-1]):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
        if pieces and types[-1] == TokenType.USER_DEFINED:  # found in the text as it is
            tokens[-1] = tokens[-1].replace(_BLANK, " ")
    merges = described["model"]["merges"]
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(merges, names, size))
    else:
        writer.add_tokenizer_model("gpt2")
        variant = _variant(described)
        assert variant is not None  # says `why_not`
        writer.add_tokenizer_pre(variant)
        # Pairs with a space between; tokenizer.json has both forms.
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
        writer.add_token_merges(pairs)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    around = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(around[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(around) > 1 and around[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


_BLANK, _BYTE = "\u2581", re.compile(r"<0x[0-9A-F]{2}>")


def _is_gemmas(described: Mapping[str, Any]) -> bool:
    """Whether pieces of words are merged by rank, blanks as a sign of their own, with bytes for
    what is in no piece, and nothing is put before the text."""
    model, normalizer = described["model"], described["normalizer"] or {}
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
    return model["type"] == "BPE" and bool(model.get("byte_fallback")) and normalizer == blanks


def _scores(merges: Sequence[Any], names: Mapping[int, str], size: int) -> list[float]:
    """Of every token: two neighbours become the one with the highest, which is the one that the
    first pair in `merges` makes."""
    rank: dict[str, int] = {}
    for place, pair in enumerate(merges):
        first, second = pair.split(" ") if isinstance(pair, str) else pair
        rank.setdefault(first + second, place)
    return [-float(rank.get(names.get(number, ""), 0)) for number in range(size)]


def _variant(described: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of how this tokenizer splits."""
    model, splitter = described["model"], described["pre_tokenizer"] or {}
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    kinds = [step.get("type") for step in steps]
    if kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    own = steps[-1].get("use_regex", True)
    normalizer = (described["normalizer"] or {}).get("type")
    if normalizer is None and own and kinds == ["ByteLevel"]:
        return "gpt-2"
    if normalizer is None and own and kinds == ["Digits", "ByteLevel"]:
        return "smollm" if steps[0].get("individual_digits") else None
    if kinds == ["Split", "ByteLevel"] and not own and steps[0].get("behavior") == "Isolated":
        found = SPLITS.get(steps[0]["pattern"].get("Regex"))
        # Qwen's composes characters first; llama.cpp leaves that out, as its own converter does.
        return found if normalizer is None or (found, normalizer) == ("qwen2", "NFC") else None
    return None
