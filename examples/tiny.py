"""What the notebooks run on, so that they take seconds: a random model of two layers that knows
some sixty words, and made-up reviews. With a real model and your own rows the cells stay the same.
"""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GOOD = ["wonderful", "moving", "brilliant", "funny", "warm", "gripping", "fine", "clever"]
BAD = ["dull", "tedious", "awful", "flat", "cold", "clumsy", "weak", "stale"]
FILMS = ["film", "movie", "actor", "scene", "camera", "plot"]
MEALS = ["meal", "soup", "cook", "table", "dish", "waiter"]
OTHERS = ["the", "a", "was", "and", "of", "in", "this", "really", "very", "all", "last", "night"]
ANSWERS = ["good", "bad", "film", "food"]
ASKED = ["Review", ":", "Verdict", "Subject"]
WORDS = ["<pad>", "<eos>", *dict.fromkeys([*ANSWERS, *ASKED, *GOOD, *BAD, *FILMS, *MEALS, *OTHERS])]

SPACE = {
    "blocks": "model.layers.*",
    "adapt": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj",
              "mlp.up_proj", "mlp.down_proj"],
    "groups": {
        "width": {
            "dim": "width", "outputs": ["mlp.gate_proj", "mlp.up_proj"],
            "inputs": ["mlp.down_proj"], "choices": [1.0, 0.5, 0.25, 0.125, 0.0625], "align": 8,
        },
        "heads": {
            "dim": "heads", "inputs": ["self_attn.o_proj"], "choices": [4, 2, 1],
            "outputs": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        },
    },
}  # fmt: skip
"""More is cut than the shipped spaces do, for such a model is too large for such a task."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    words = models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<pad>")
    backend = Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def model(seed: int = 0) -> LlamaForCausalLM:
    """Random weights, as large as those of a trained model are beside its embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def reviews(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows with `text`, `verdict` (good or bad: two adjectives tell) and `subject` (film or food:
    the noun tells)."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        verdict, subject = draw.choice(["good", "bad"]), draw.choice(["film", "food"])
        first, second = draw.sample(GOOD if verdict == "good" else BAD, 2)
        noun = draw.choice(FILMS if subject == "film" else MEALS)
        before, between = draw.sample(OTHERS, 2)
        text = f"{before} {first} {noun} {between} {second}"
        rows.append({"text": text, "verdict": verdict, "subject": subject})
    return rows
