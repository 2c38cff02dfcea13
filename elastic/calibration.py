"""What a graph reads while a compressor watches: the task's own examples, with their answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from elastic.data.encoding import encode_example
from elastic.formats.onnx_session import step_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from elastic.data.task import Example

Inputs = dict[str, np.ndarray]


def calibration_inputs(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, examples: Iterable[Example]
) -> list[Inputs]:
    """One per example: input_ids and attention_mask (1, length), and token_type_ids where the model
    tells sentences apart. Prompt and answer of a language model, without the token that ends it,
    which no model reads; the text of a classifier."""
    found = []
    for example in examples:
        encoded = encode_example(tokenizer, model, example)
        ids = encoded.ids[:-1] if encoded.label is None else encoded.ids
        inputs = {"input_ids": np.array([ids], np.int64)}
        inputs["attention_mask"] = np.ones_like(inputs["input_ids"])
        if encoded.types:
            inputs["token_type_ids"] = np.array([encoded.types], np.int64)
        found.append(inputs)
    return found


def completed(inputs: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> Inputs:
    """All that a graph of `elastic.formats` reads for these tokens, with nothing before them.

    `shapes` are those of the graph's inputs; of past_key_values.N.* (batch, kv_heads, past,
    head_dim) the known axes 1 and 3 are read.
    """
    ids = inputs["input_ids"]
    found = step_inputs(ids, 0, set(shapes))
    if "beam_idx" in shapes:
        found["beam_idx"] = np.arange(len(ids), dtype=np.int32)
    for name, shape in shapes.items():
        if name.startswith("past_key_values."):
            found[name] = np.zeros((len(ids), shape[1], 0, shape[3]), np.float32)
    return found | {name: array for name, array in inputs.items() if name in shapes}
