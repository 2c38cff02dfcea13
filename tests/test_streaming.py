"""What is sliced and merged one tensor at a time is what `compact` makes of all at once."""

import copy

import pytest
import torch

from elastic.adapters.attach import linear_
from elastic.merging import compact
from elastic.space import SearchSpace
from elastic.streaming import streamed
from elastic.supernet import Supernet
from tests import tiny
from tests.families import FAMILIES, model_of
from tests.test_supernet import several

DEPTHS = {"dim": "depth", "choices": [1.0, 0.5], "drop_ends": True}


def pair(family: str, method: str = "lora") -> tuple[torch.nn.Module, Supernet, Supernet]:
    """The untouched base, a supernet of it, and the same without data."""
    base = model_of(family)
    space = SearchSpace.load(FAMILIES[family][1])
    net = Supernet(copy.deepcopy(base), space, tiny.ADAPTERS[method])
    order = tiny.permutations(net)
    net.reorder(order)
    tiny.randomize_(net)
    return base, net, without_data(base, net, space, method, order)


def without_data(base, net, space, method, order) -> Supernet:
    with torch.device("meta"):
        shell = type(base)(copy.deepcopy(base.config)).to(base.dtype)
    bare = Supernet(linear_(shell), space, tiny.ADAPTERS[method], order=order, start=False)
    bare.load_factors(net.factor_state())
    return bare


def same(base, net, bare) -> None:
    for sub in several(net, draws=1):
        expected = compact(net, sub).state_dict()
        found = streamed(base, bare, sub, {name: x.detach() for name, x in net.head.items()})
        assert list(found.tensors) == list(expected)
        for name, tensor in expected.items():
            made = found.tensors[name]()
            assert torch.equal(made, tensor), name
            assert found.model.state_dict()[name].shape == made.shape
            assert found.model.state_dict()[name].dtype == made.dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    same(*pair(family))


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_every_method(method):
    same(*pair("llama", method))


def test_depth_and_heads():
    base = model_of("llama", layers=4)
    value = tiny.space_dict(heads=True)
    value["groups"]["depth"] = DEPTHS
    space = SearchSpace.from_dict(value)
    net = Supernet(copy.deepcopy(base), space, tiny.ADAPTERS["lora"])
    order = tiny.permutations(net)
    net.reorder(order)
    tiny.randomize_(net)
    same(base, net, without_data(base, net, space, "lora", order))


def test_tensors_that_nobody_changed_are_the_base_models_own():
    base, net, bare = pair("llama")
    found = streamed(base, bare, net.space.minimal())
    embeddings = "model.embed_tokens.weight"
    assert found.tensors[embeddings]().data_ptr() == base.get_parameter(embeddings).data_ptr()
