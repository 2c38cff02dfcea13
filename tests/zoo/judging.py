"""What comes of a family: whether every size of it is one function, cut, merged and written."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from elastic.config import ModelConfig
from elastic.errors import ElasticError, ExportError
from elastic.formats import hf
from elastic.models import loading
from elastic.models.kinds import require
from elastic.spaces.bound import SubAdapter
from elastic.supernet.discovery import discover
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.laws import close, one_function
from tests.zoo.building import MAPPINGS, config_of, dtype_of, model_of, output

RIGHT, REFUSED, NOT_BUILT, WRONG = "right", "refused", "not built", "wrong"
HEAD = {"causal": "language", "encoder-decoder": "language", "classification": "classification"}


@dataclass(frozen=True)
class Outcome:
    """What came of a family, with the words of a refusal, or the dimensions that are elastic."""

    what: str
    words: str = ""
    elastic: tuple[str, ...] = ()
    onnx: str = ""
    """As `tests.zoo.graphs` says; nothing where that was not asked."""

    def as_dict(self) -> dict[str, Any]:
        """As the file of outcomes has it."""
        return {name: value for name, value in asdict(self).items() if value}


def judge(model_type: str, use: str) -> Outcome:
    """The outcome of this family."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with torch.no_grad():
                elastic = _held_to_the_laws(model_type, use, Path(folder))
            return Outcome(RIGHT, elastic=tuple(sorted(elastic)))
        except ElasticError as error:
            missing = isinstance(error.__cause__, ImportError)
            words = str(error.__cause__ if missing else error)
            return Outcome(NOT_BUILT if missing else REFUSED, shortened(words, folder))
        except Exception as error:  # what must not be: a wrong number, or no line of ours
            return Outcome(WRONG, shortened(f"{type(error).__name__}: {error}", folder))


def shortened(words: str, folder: str) -> str:
    """On one line, without the folder's name, which is another every time."""
    return " ".join(words.replace(folder, "FOLDER").split())[:200].rstrip()


def _held_to_the_laws(model_type: str, use: str, folder: Path) -> set[str]:
    """Dimensions that the space found has; ElasticError for what is refused, anything else where a
    law is broken."""
    dtype = dtype_of(model_type)
    precision = 1e-3 if dtype == torch.float32 else 1e-5  # norms round to float32 in any type
    config = config_of(model_type, use)
    space = discover(skeleton_of(config, model_type, use, folder / "base"))
    net = Supernet(model_of(config, use, dtype), space, tiny.ADAPTERS["lora"])
    expected = output(net.model)
    net.reorder(tiny.permutations(net))
    close(output(net.model), expected, precision)
    tiny.randomize_(net)
    full = output(net.model)
    for number, sub in enumerate(_cut(net)):
        active, small = one_function(net, sub, output, precision)
        assert (active - full).abs().max() > 1e-3 * full.abs().max(), "the cut changes nothing"
        close(_reloaded(small, folder / str(number)), active, precision)
    return {group.dim for group in net.space}


def skeleton_of(
    config: PreTrainedConfig, model_type: str, use: str, folder: Path
) -> PreTrainedModel:
    """What is made of the configuration alone, as of a user's folder."""
    config.architectures = [MAPPINGS[use][model_type]]
    config.save_pretrained(folder)
    model = ModelConfig(path=str(folder), head=HEAD[use])
    require(model, loading.architecture_of(model))
    return loading.skeleton(model, dtype_of(model_type))


def _cut(net: Supernet) -> Iterator[SubAdapter]:
    """The smallest, and one whose layers differ."""
    yield net.space.minimal()
    yield net.space.random(random.Random(3))


def _reloaded(small: PreTrainedModel, folder: Path) -> Tensor:
    if reason := hf.why_not(small):
        raise ExportError(f"hf: {reason}")
    return output(hf.load(hf.write(small, None, folder), small.dtype))


def families() -> list[tuple[str, str]]:
    """(type of model, use), every pair once."""
    return [(model_type, use) for use, names in MAPPINGS.items() for model_type in names]
