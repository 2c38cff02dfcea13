"""What is sliced and merged one tensor at a time is what `compact` makes of all at once."""

from __future__ import annotations

import copy

import pytest

from elastic.formats import hf
from elastic.models.meter import Meter
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.streaming import streamed
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import FAMILIES, model_of
from tests.helpers.laws import pair, same, without_data

DEPTHS = {"dim": "depth", "choices": [1.0, 0.5], "drop_ends": True}


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


@pytest.mark.parametrize("family", ["llama, tied", "gpt2", "gpt-neox", "t5"])
@pytest.mark.parametrize("shard", ["50GB", 40_000])
def test_the_folder_is_the_same_to_the_byte(family, shard, tmp_path):
    base, net, bare = pair(family)
    for number, sub in enumerate((net.space.maximal(), net.space.minimal())):
        found = streamed(base, bare, sub)
        at_once, in_turn = tmp_path / f"at-once-{number}", tmp_path / f"in-turn-{number}"
        hf.write(compact(net, sub), None, at_once, max_shard_size=shard)
        hf.write(found.model, None, in_turn, max_shard_size=shard, tensors=found.tensors)
        names = sorted(file.name for file in at_once.iterdir())
        assert names == sorted(file.name for file in in_turn.iterdir())
        assert ("model.safetensors.index.json" in names) is (shard != "50GB")
        for name in names:
            assert (at_once / name).read_bytes() == (in_turn / name).read_bytes(), name


def test_no_more_than_a_shard_is_in_memory(tmp_path):
    """Beside it, the tensor that is being made: what is cut of it, and twice in a wider type."""
    base, net, bare = pair("llama")
    sub = net.space.uniform(0.75)
    found, shard = streamed(base, bare, sub), 100_000
    largest = max(tensor.nbytes for tensor in base.state_dict().values())
    total = sum(tensor.nbytes for tensor in found.model.state_dict().values())
    assert total > 5 * shard
    held = [*base.state_dict().values(), *net.factor_state().values()]
    with Meter([*held, *bare.model.parameters()]).recording() as meter:
        hf.write(found.model, None, tmp_path, max_shard_size=shard, tensors=found.tensors)
    assert meter.peak <= shard + 3 * largest


def test_of_a_base_in_another_order_what_stays_is_gathered():
    """Not the whole of a layer to cut it then; beside it there are the sum with the update, and
    places."""
    base, net, bare = pair("llama")
    found = streamed(base, bare, net.space.minimal())
    for name in ("gate_proj", "down_proj"):
        key = f"model.layers.0.mlp.{name}.weight"
        with Meter(
            [*base.state_dict().values(), *bare.factor_state().values()]
        ).recording() as meter:
            made = found.tensors[key]()
        assert meter.peak <= 2.1 * made.nbytes < base.get_parameter(key).nbytes + made.nbytes
