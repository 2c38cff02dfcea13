"""A tiny encoder-decoder model with its space, and how its runners are driven."""

from __future__ import annotations

import numpy as np
import torch

from elastic.spaces.declared import SearchSpace
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny

SPACE = [
    {
        "blocks": "*.block.*.layer.0",
        "adapt": ["SelfAttention.q", "SelfAttention.v"],
        "groups": {"rank": {"dim": "rank", "of": ["SelfAttention.q", "SelfAttention.v"],
                            "choices": [1.0, 0.5, 1]}},
    },
    {
        "blocks": "encoder.block.*.layer.1",
        "adapt": ["DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo"],
        "groups": {"width": {"dim": "width", "choices": [1.0, 0.5, 0.25],
                             "outputs": ["DenseReluDense.wi_0", "DenseReluDense.wi_1"],
                             "inputs": ["DenseReluDense.wo"]}},
    },
    {
        "blocks": "decoder.block.*.layer.2",
        "adapt": ["DenseReluDense.wo"],
        "groups": {"width": {"dim": "width", "choices": [1.0, 0.5],
                             "outputs": ["DenseReluDense.wi_0", "DenseReluDense.wi_1"],
                             "inputs": ["DenseReluDense.wo"]}},
    },
]  # fmt: skip


def net_of(method: str = "lora") -> Supernet:
    net = Supernet(tiny.t5(dtype=torch.float64), SearchSpace.from_dict(SPACE),
                   tiny.ADAPTERS[method])  # fmt: skip
    net.reorder(tiny.permutations(net))
    return tiny.randomize_(net)


def drive(runner, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(1 + length, batch, vocab): logits of the first token, and after each of `target`."""
    steps = [runner.prefill(source)]
    return np.stack(steps + [runner.decode(target[:, i : i + 1]) for i in range(target.shape[1])])
