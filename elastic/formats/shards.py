"""Weights of a Hugging Face folder, written one file after another: one of them is in memory."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import revert_weight_conversion

from elastic.console import counting
from elastic.errors import ExportError
from elastic.files import write_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Tensors = Mapping[str, "Callable[[], Tensor]"]
"""What makes every tensor of a model's state, by its name there."""
INDEX = "model.safetensors.index.json"
"""Which tensor is in which file."""
WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
"""Files of which transformers takes one for the model, whichever it comes upon first."""


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
    index, floating-point tensors in `dtype`. Weights that lay there before are removed then:
    transformers would take them for the model's. ExportError for a tensor that `tensors` lacks.

    `model` says shapes, ties (a tied tensor is written once) and, where `original`, under which
    names transformers expects its tensors on disk; it may be without data. Matrices in `transposed`
    lie (in, out) in the file.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    state = {}
    own = _untied(model)
    if missing := [name for name in own if name not in tensors]:
        raise ExportError(
            f"{directory}: {missing[0]} of the model is not among the tensors to be written "
            f"({len(missing)} are missing); give all of its state"
        )
    for name, tensor in own.items():
        shape = reversed(tensor.shape) if name in transposed else tensor.shape
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        state[name] = torch.empty(tuple(shape), dtype=kind, device="meta")
    source = {id(tensor): name for name, tensor in state.items()}
    on_disk = revert_weight_conversion(model, dict(state)) if original else state
    if any(id(tensor) not in source for tensor in on_disk.values()):
        # Some are joined or split on disk, as the experts of a mixture.
        tensors = _converted(model, tensors, state, on_disk)
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
            directory / INDEX,
            json.dumps(index, indent=2, sort_keys=True) + "\n",
        )
    written = {*plan.filename_to_tensors, *([INDEX] if plan.is_sharded else [])}
    for path in directory.iterdir():
        if re.fullmatch(WEIGHTS, path.name) and path.name not in written:
            path.unlink()


def joined_bytes(model: PreTrainedModel) -> int:
    """Of tensors that are joined from others while a model of this class loads, and so are in
    memory; tensors without data will do."""
    state = {name: tensor.to("meta") for name, tensor in _untied(model).items()}
    on_disk = {id(x) for x in revert_weight_conversion(model, dict(state)).values()}
    return sum(tensor.nbytes for tensor in state.values() if id(tensor) not in on_disk)


def _converted(
    model: PreTrainedModel,
    tensors: Tensors,
    state: Mapping[str, Tensor],
    on_disk: Mapping[str, Tensor],
) -> Tensors:
    """What makes every tensor of the file, where that is not one of the model's: those of one block
    at a time are in memory, unless some are joined across blocks."""
    blocks: dict[str, list[str]] = {}
    for name in state:
        match = re.match(r"(.*?\.\d+)\.", name)
        blocks.setdefault(match[1] if match else name, []).append(name)
    inside: dict[str, str] = {}
    for block, names in blocks.items():
        inside |= dict.fromkeys(
            revert_weight_conversion(model, {n: state[n] for n in names}), block
        )
    if set(inside) != set(on_disk):
        inside, blocks = dict.fromkeys(on_disk, ""), {"": list(state)}

    @functools.lru_cache(1)
    def made(block: str) -> dict[str, Tensor]:
        own = {n: tensors[n]().detach().to("cpu", state[n].dtype) for n in blocks[block]}
        return revert_weight_conversion(model, own)

    return {
        name: functools.partial(lambda name: made(inside[name])[name], name) for name in on_disk
    }


def _untied(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state, of tied tensors the one that the others are made from when a model loads."""
    kept = model.state_dict(keep_vars=True)
    for name, source in model.all_tied_weights_keys.items():
        if name in kept and kept[name] is kept.get(source):
            del kept[name]
    return kept
