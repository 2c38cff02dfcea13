"""A file for llama.cpp."""

from __future__ import annotations

from pathlib import Path

from elastic.formats import gguf
from elastic.writers.base import Format, Source, Which


class Gguf(Format):
    """For llama.cpp, in half precision; nothing here runs it, so what was written is read back."""

    def why_not(self, source: Source) -> str | None:
        return gguf.why_not(source.models["compact"], source.base.tokenizer)

    def write(self, source: Source, which: Which, directory: Path) -> None:
        model = source.models[which]
        file = gguf.write(model, source.base.tokenizer, directory, name=source.name)
        gguf.check(file, model)
