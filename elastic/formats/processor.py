"""What stands beside a model that reads pictures: how they become its inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from elastic.files import read_json, write_text
from elastic.formats.code_names import without_code
from elastic.models.wrappers import wraps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PATTERNS = ("*processor_config.json", "chat_template.json", "chat_template.jinja")
"""Files of a processor, as releases of transformers name them."""


def copy_beside(model: PreTrainedModel, directory: Path) -> None:
    """Copy the processor's files of the folder that a model was loaded from, those that are not
    there yet, without names of code; nothing of a model of text."""
    name = model.config.name_or_path  # of a model that was made in memory, nothing
    source = Path(name)
    if not name or not wraps(model.config) or not source.is_dir():
        return
    for pattern in PATTERNS:
        for file in source.glob(pattern):
            target = directory / file.name
            if target.exists():
                continue
            if file.suffix == ".json":
                values = without_code(read_json(file))
                write_text(target, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
            else:
                shutil.copyfile(file, target)
