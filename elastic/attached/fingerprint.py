"""What a base model in memory is known by."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from elastic.models.head import head_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VALUES = 4096
"""Of every tensor, evenly spread."""


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and some values of all weights, those of a head that is trained
    left out. Values are rounded to bfloat16, so that a base loaded in float32 or in bfloat16 is the
    same one. Enough to tell a wrong model, at the price of milliseconds; no proof against forgery.
    """
    trained = head_of(model)
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name in trained or not tensor.is_floating_point():
            continue
        values = tensor.detach().flatten()
        step = max(1, values.numel() // VALUES)
        some = values[::step].to("cpu", torch.bfloat16).view(torch.int16)
        total.update(f"{name} {list(tensor.shape)}\n".encode())
        total.update(some.numpy().tobytes())
    return f"values:{total.hexdigest()}"
