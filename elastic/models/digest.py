"""What base weights are known by, whatever files and type they are in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from elastic.console import track
from elastic.errors import ModelError
from elastic.plain import one_line

FETCH = "if files are damaged or missing, fetch or save the model again"


def digest_of(folder: Path | str) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors on disk, sorted by name;
    ModelError where there are none.

    Independent of how the weights are split into files and of the type they are loaded as.
    """
    files = weights_in(folder)
    entries: dict[str, tuple[Path, dict[str, Any], int]] = {}
    for file in files:
        header, start = _safetensors_header(file)
        entries |= {name: (file, entry, start) for name, entry in header.items()}
    total = hashlib.sha256()
    for name in track(sorted(entries), "hashing weights"):
        file, entry, start = entries[name]
        total.update(f"{name} {entry['dtype']} {entry['shape']}\n".encode())
        begin, end = entry["data_offsets"]
        with file.open("rb") as stream:
            stream.seek(start + begin)
            left = end - begin
            while left:
                chunk = stream.read(min(left, 1 << 24))
                if not chunk:
                    raise ModelError(f"{file}: shorter than its header says; {FETCH}")
                total.update(chunk)
                left -= len(chunk)
    return f"sha256:{total.hexdigest()}"


def weights_in(folder: Path | str) -> list[Path]:
    """The files that hold a model's weights; ModelError where there are none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no .safetensors weights (pickled weights are not read)")
    return files


def _safetensors_header(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and where its data starts."""
    try:
        safe_open(file, "numpy")  # refuses what is no such file: sizes and places are what they say
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError) as error:
        reason = one_line(error)
        raise ModelError(
            f"{file}: cut off, or not written by safetensors ({reason}); {FETCH}"
        ) from None
    header.pop("__metadata__", None)
    return header, 8 + length
