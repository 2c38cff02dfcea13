"""Weights of a Hugging Face folder, written one file after another: one of them is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import revert_weight_conversion

from elastic.console import counting
from elastic.files import write_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Tensors = Mapping[str, "Callable[[], Tensor]"]
"""What makes every tensor of a model's state, by its name there."""


def tensors_of(model: PreTrainedModel) -> Tensors:
    """Of a model in memory."""
    return {name: tensor.detach for name, tensor in model.state_dict().items()}


def write(
    model: PreTrainedModel,
    tensors: Tensors,
    directory: Path,
    *,
    dtype: torch.dtype,
    original: bool,
    max_shard_size: int | str,
    transposed: frozenset[str] = frozenset(),
) -> None:
    """Write model.safetensors, or model-N-of-M.safetensors of at most `max_shard_size` with their
    index, floating-point tensors in `dtype`.

    `model` says shapes, ties (a tied tensor is written once) and, where `original`, under which
    names transformers expects its tensors on disk; it may be without data. Matrices in `transposed`
    lie (in, out) in the file.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    state = {}
    for name, tensor in _untied(model).items():
        shape = reversed(tensor.shape) if name in transposed else tensor.shape
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        state[name] = torch.empty(tuple(shape), dtype=kind, device="meta")
    source = {id(tensor): name for name, tensor in state.items()}
    on_disk = revert_weight_conversion(model, dict(state)) if original else state
    if any(id(tensor) not in source for tensor in on_disk.values()):
        # Some are joined or split on disk, as the experts of a mixture: that takes all of them.
        made = {name: tensors[name]().detach().to("cpu", state[name].dtype) for name in state}
        on_disk = revert_weight_conversion(model, made)
        tensors = {name: tensor.detach for name, tensor in on_disk.items()}
        names = {name: name for name in on_disk}
    else:
        names = {name: source[id(tensor)] for name, tensor in on_disk.items()}
    plan = split_torch_state_dict_into_shards(on_disk, max_shard_size=max_shard_size)
    with counting("writing weights", len(on_disk)) as steps:
        for file, members in plan.filename_to_tensors.items():
            shard = {}
            for name in members:
                tensor = tensors[names[name]]().detach()
                tensor = tensor.T if names[name] in transposed else tensor
                shard[name] = tensor.to("cpu", on_disk[name].dtype).contiguous()
                steps.to(steps.done + 1)
            save_file(shard, directory / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_text(
            directory / "model.safetensors.index.json",
            json.dumps(index, indent=2, sort_keys=True) + "\n",
        )


def _untied(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state, of tied tensors the one that the others are made from when a model loads."""
    kept = model.state_dict(keep_vars=True)
    for name, source in model.all_tied_weights_keys.items():
        if name in kept and kept[name] is kept.get(source):
            del kept[name]
    return kept
