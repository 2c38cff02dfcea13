"""Base models as llama.cpp has them, in one GGUF file: made an ordinary folder once.

transformers reads such files and turns their weights back into float32. It passes over what it does
not know, so here whatever would be lost is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from elastic.console import busy
from elastic.errors import MissingExtra, ModelError
from elastic.files import new_directory
from elastic.plain import one_line

SUFFIX, MAGIC = ".gguf", b"GGUF"


def write_folder(file: Path, folder: Path) -> None:
    """The model and tokenizer of a GGUF file as a folder, with weights in float32, all of them in
    memory at once; ModelError, before any weight is read where that is possible, for what is no
    such file, or what transformers would read only in part, MissingExtra without gguf."""
    _require_whole(file)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    location: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name
    }  # fmt: skip
    try:
        with busy(f"reading {file.name}"):
            # Read once for both: to read the file's head takes seconds.
            location["config"] = AutoConfig.from_pretrained(**location)
            tokenizer = AutoTokenizer.from_pretrained(**location)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            **location, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # the library raises many kinds
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise _refused(file, f"transformers cannot read it: {reason}") from error
    if lost := sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}):
        raise _refused(file, f"transformers finds no weights in it for {', '.join(lost[:3])}")
    # The weights are plain float32 now; only these two marks make saving refuse them.
    model.hf_quantizer = None
    del model.config.quantization_config
    with busy(f"writing {folder.name}"), new_directory(folder) as building:
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)


def _require_whole(file: Path) -> None:
    """ModelError unless the file holds a model, and nothing that transformers would not read;
    MissingExtra where nothing reads such files."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtra("gguf", "gguf", f"model.path {file}") from error
    with file.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise ModelError(f"model.path {file}: not a GGUF file, whatever its name says")
    if re.search(r"-\d{5}-of-\d{5}$", file.stem):
        raise ModelError(
            f"model.path {file}: one part of a model in several; join them first "
            "(llama-gguf-split --merge FIRST.gguf WHOLE.gguf)"
        )
    try:
        reader = GGUFReader(file)
        settings: dict[str, Any] = {
            name: field.contents()
            for name, field in reader.fields.items()
            if name.endswith(".rope.scaling.type")
        }
        names = [tensor.name for tensor in reader.tensors]
    except Exception as error:  # whatever a damaged file makes numpy and the reader raise
        raise ModelError(
            f"model.path {file}: damaged, or cut off ({type(error).__name__}: {one_line(error)})"
        ) from None
    scaled = [name for name, value in settings.items() if value != "none"]
    scaled += [name for name in names if name.startswith("rope_f")]
    if scaled and not any(name.startswith("gpt-oss.") for name in scaled):
        raise _refused(
            file, f"positions are scaled ({scaled[0]}), which transformers does not read"
        )


def _refused(file: Path, reason: str) -> ModelError:
    return ModelError(
        f"model.path {file}: {reason}; give the folder or hub name that the file was made from"
    )
