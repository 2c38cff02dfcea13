"""Every search space that is shipped binds to its model."""

import math
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from elastic.errors import ConfigError
from elastic.spaces.declared import SearchSpace
from tests.helpers import mixtures
from tests.helpers.families import FAMILIES, model_of

SHIPPED = sorted(Path(__file__).parents[2].joinpath("search_spaces").rglob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_spaces_load_bind_and_survive(path):
    space = SearchSpace.load(str(path))
    assert SearchSpace.from_dict(space.as_dict(), space.source) == space
    stem = path.stem.removeprefix("lonas-")
    if path.stem == "lonas-bert":
        model = bert_base()
    elif path.stem.startswith("moe"):
        model = mixtures.model_of("mixtral")
    else:
        [family, *_] = [name for name, (_, own, _) in FAMILIES.items() if stem.startswith(own)]
        model = model_of(family)
    bound = space.bind(model, 32)
    assert bound.size == math.prod(len(group.choices) for group in bound)
    layers = {section.blocks: _blocks(model, section.blocks) for section in space.sections}
    assert len(bound.targets) == sum(layers[s.blocks] * len(s.adapt) for s in space.sections)
    count = {s: sum(1 if g.dim in ("depth", "vocab") else layers[s.blocks] for g in s.groups)
             for s in space.sections}  # fmt: skip
    assert len(bound.groups) == sum(count.values())


def bert_base() -> BertForSequenceClassification:
    """The one model whose layers a space names one by one."""
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig())


def _blocks(model, pattern: str) -> int:
    return len([name for name, _ in model.named_modules() if fnmatch(name, pattern)
                and name.count(".") == pattern.count(".")])  # fmt: skip


def test_the_shipped_llama_space_is_found_by_name():
    assert SearchSpace.load("llama").sections[0].groups[1].choices == (1.0, 0.875, 0.75, 0.625, 0.5)
    with pytest.raises(ConfigError, match="did you mean 'llama'"):
        SearchSpace.load("lama")
