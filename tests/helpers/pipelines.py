"""What the runtimes' own pipelines generate from written folders, as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from tests.helpers import tiny

NEW = 12
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}
"""OpenVINO as torch computes."""


def answer(row: list[int]) -> list[int]:
    """Without the token that ends it, and what is behind it."""
    return row[: row.index(tiny.EOS)] if tiny.EOS in row else row


def by_torch(model: PreTrainedModel, row: list[int], **options: Any) -> list[int]:
    """Greedily, unless `options` of `generate` say otherwise."""
    ids = torch.tensor([row])
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return answer(whole[0, len(row) :].tolist())


def by_onnxruntime(folder: Path, rows: list[list[int]], **options: Any) -> list[list[int]]:
    """What onnxruntime-genai adds to each row; all rows end with the longest."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    length = max(map(len, rows))
    parameters.set_search_options(max_length=length + NEW, batch_size=len(rows), **options)
    generator = onnxruntime_genai.Generator(model, parameters)
    padded = [row + [tiny.PAD] * (length - len(row)) for row in rows]
    generator.append_tokens(np.array(padded, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [answer(generator.get_sequence(row).tolist()[length:]) for row in range(len(rows))]


class ByOpenvino:
    """openvino-genai on one folder."""

    def __init__(self, folder: Path, backend: str, **settings: Any) -> None:
        import openvino_genai

        self.pipeline = openvino_genai.LLMPipeline(
            str(folder), "CPU", ATTENTION_BACKEND=backend, **EXACT, **settings
        )

    def __call__(self, row: list[int], **options: Any) -> list[int]:
        import openvino
        import openvino_genai

        ids = np.array([row], np.int64)
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
        )
        options = {"max_new_tokens": NEW, "do_sample": False} | options
        return answer(list(self.pipeline.generate(inputs, **options).tokens[0]))
