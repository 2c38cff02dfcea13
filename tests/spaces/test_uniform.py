"""One size for all layers: the nearest such sub-adapter, and layers filled up with zeros."""

import json
import random

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from elastic.errors import RunError
from elastic.formats import hf
from elastic.formats.auto_class import auto_of
from elastic.formats.padding import padded
from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.spaces.uniform import covering, kinds, nearest_uniform, with_sizes
from elastic.supernet.compact import compact
from elastic.supernet.cost import Counter
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import FAMILIES, GROUPED, ROUNDED, model_of, net_of, output
from tests.helpers.laws import close

FULL_WIDTH = {"bloom"}
"""Families whose configuration knows no other width than four times the hidden size."""
LAYERS = 4


def wide_space(*, depth: bool = False) -> dict:
    declared = tiny.space_dict(heads=True)
    if depth:
        declared["groups"]["depth"] = {"dim": "depth", "choices": [LAYERS, 3, 2]}
    return declared


def bound(*, depth: bool = False):
    model = tiny.llama(num_hidden_layers=LAYERS)
    return model, SearchSpace.from_dict(wide_space(depth=depth)).bind(model, tiny.RANK)


MODEL, SPACE = bound()
_, DEEP = bound(depth=True)


def sizes(space, sub, dim: str) -> list[int]:
    return [sub[group.name] for group in space if group.dim == dim and sub[group.name]]


# The nearest uniform sub-adapter.


@given(st.randoms(use_true_random=False))
def test_no_uniform_sub_adapter_is_nearer_in_operations(generator):
    """Against all of them, counted layer by layer."""
    counter = Counter(MODEL, SPACE)
    sub = SPACE.random(generator)
    found = nearest_uniform(SPACE, sub)
    assert tiny.is_uniform(SPACE, found)
    for kind, groups in kinds(SPACE).items():
        rest = {other: other[1] for other in kinds(SPACE)}

        def macs(size: int, kind=kind, rest=rest) -> int:
            return counter(with_sizes(SPACE, SPACE.maximal(), rest | {kind: size})).macs

        own = dict(SPACE.maximal().choices) | {g.name: sub[g.name] for g in groups}
        goal = counter(SubAdapter(tuple(own.items()))).macs
        taken = found[groups[0].name]
        distances = {size: abs(macs(size) - goal) for size in groups[0].choices}
        assert distances[taken] == min(distances.values())
        assert taken == max(s for s, d in distances.items() if d == distances[taken])


@given(st.randoms(use_true_random=False))
def test_ranks_and_depth_stay_and_the_result_is_a_point_of_the_space(generator):
    sub = DEEP.random(generator)
    found = nearest_uniform(DEEP, sub)
    assert DEEP.check(found) == found and tiny.is_uniform(DEEP, found)
    for group in DEEP:
        if group.dim in ("rank", "depth"):
            assert found[group.name] == sub[group.name]
        assert (found[group.name] == 0) == (sub[group.name] == 0)
    assert nearest_uniform(DEEP, found) == found


@given(st.randoms(use_true_random=False))
def test_no_size_of_heads_is_nearer_where_the_queries_are_as_chosen(generator):
    """Nor the other way round: what one key-value head costs depends on its query heads."""
    declared = wide_space()
    declared["groups"]["attention_heads"]["choices"] = [4, 3, 2, 1]
    queries = {"dim": "query_heads", "outputs": ["self_attn.q_proj"], "choices": [4, 2, 1]}
    declared["groups"]["queries"] = declared["groups"]["attention_heads"] | queries
    model = tiny.llama(num_hidden_layers=LAYERS, num_attention_heads=16, num_key_value_heads=4)
    space = SearchSpace.from_dict(declared).bind(model, tiny.RANK)
    counter, sub = Counter(model, space), space.random(generator)
    goal = counter(sub).macs
    found = nearest_uniform(space, sub)
    assert tiny.is_uniform(space, found) and nearest_uniform(space, found) == found
    for (dim, _), groups in kinds(space).items():
        distances = {}
        for size in groups[0].choices:
            uniform = sub.as_dict() | {group.name: size for group in groups}
            distances[size] = abs(counter(SubAdapter(tuple(uniform.items()))).macs - goal)
        assert distances[found[groups[0].name]] == min(distances.values()), dim


def test_a_size_that_does_not_fit_is_passed_over_for_the_next():
    sub = SPACE.minimal()
    asked = []

    def fits(uniform: SubAdapter) -> bool:
        asked.append(uniform)
        return uniform["model.layers.0.mlp_width"] >= 48

    found = nearest_uniform(SPACE, sub, fits)
    assert set(sizes(SPACE, found, "width")) == {48}
    assert set(sizes(SPACE, found, "heads")) == set(sizes(SPACE, sub, "heads"))
    assert asked[0] == sub and asked[-1] == found
    assert sizes(SPACE, nearest_uniform(SPACE, sub, lambda _: False), "width") == [64] * LAYERS


def test_a_foreign_sub_adapter_is_refused():
    with pytest.raises(RunError, match="differ in"):
        nearest_uniform(SPACE, SubAdapter((("width", 3),)))


@given(st.randoms(use_true_random=False))
def test_what_covers_a_sub_adapter_is_uniform_and_no_smaller(generator):
    sub = DEEP.random(generator)
    found = list(covering(DEEP, sub))
    assert len(found) == 4  # two kinds, each at its largest or full size
    for larger in found:
        assert tiny.is_uniform(DEEP, larger)
        assert all(larger[name] >= size for name, size in sub.choices)
    for dim in ("width", "heads"):
        assert set(sizes(DEEP, found[0], dim)) == {max(sizes(DEEP, sub, dim))}


# Filled up with zeros.


def law(net: Supernet, sub: SubAdapter, folder, precision: float) -> transformers.PreTrainedModel:
    """Padded and compact are one function; the folder is the family's own class, without code."""
    small = compact(net, sub)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    expected = output(small)
    wide = padded(small, net.space, sub)
    close(output(wide), expected, precision)
    hf.write(wide, None, folder)
    assert not (folder / hf.CODE).exists()
    saved = json.loads((folder / "config.json").read_text())
    assert saved["architectures"] == [type(small).__name__] and "auto_map" not in saved
    auto = getattr(transformers, auto_of(type(small).__name__))
    again = auto.from_pretrained(folder, dtype=torch.float64)
    assert type(again).__name__ == type(small).__name__
    close(output(tiny_norms(again, small).eval()), expected, precision)
    # The compact model is as it was.
    assert all(torch.equal(before[name], tensor) for name, tensor in small.state_dict().items())
    close(output(small), expected, 1e-12)
    return again


def tiny_norms(again, small):
    """The tests' Llama has norms that do not round to float32."""
    wide = any(isinstance(module, torch.nn.RMSNorm) for module in small.modules())
    return tiny.wide_norms_(again) if wide else again


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_is_the_same_function_of_the_plain_class(family, tmp_path):
    net = net_of(family)
    sub = net.space.random(random.Random(3))
    assert not tiny.is_uniform(net.space, sub)
    wide = law(net, sub, tmp_path, 1e-5 if family in ROUNDED else 1e-10)
    whole = any(net.space.indices(sub)[g.name] == 0 for g in net.space if g.dim == "width")
    if not whole and family not in FULL_WIDTH:
        assert sum(p.numel() for p in wide.parameters()) < sum(
            p.numel() for p in model_of(family).parameters()
        )


@pytest.mark.parametrize("space", ["heads", "query_heads", "both", "depth"])
@pytest.mark.parametrize("biases", [False, True])
def test_padded_heads_and_blocks_left_out(space, biases, tmp_path):
    """Key-value heads with their queries; queries of each key-value head, in four parts; both at
    once; blocks that are gone."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": LAYERS,
             "hidden_size": 64, "attention_bias": biases, "mlp_bias": biases}  # fmt: skip
    declared = wide_space(depth=space == "depth")
    declared["groups"]["attention_heads"]["choices"] = [4, 3, 2, 1]
    queries = {"dim": "query_heads", "outputs": ["self_attn.q_proj"], "choices": [2, 1]}
    if space == "query_heads":
        declared["groups"]["attention_heads"] |= queries
    if space == "both":
        declared["groups"]["queries"] = declared["groups"]["attention_heads"] | queries
    net = Supernet(
        tiny.llama(**sizes), SearchSpace.from_dict(declared), tiny.ADAPTERS["lora"], seed=0
    )
    net.reorder(tiny.permutations(net))
    tiny.randomize_(net)
    drawn = [net.space.random(random.Random(seed)) for seed in range(6)]
    mixed = [sub for sub in drawn if not tiny.is_uniform(net.space, sub)]
    for number, sub in enumerate(mixed[:2]):
        wide = law(net, sub, tmp_path / str(number), 1e-10)
        assert len(wide.model.layers) == len(compact(net, sub).model.layers)


def test_padding_goes_to_the_widest_layer_and_no_further(tmp_path):
    net = net_of("llama")
    chosen = net.space.minimal().as_dict()
    name = next(group.name for group in net.space if group.dim == "width")
    chosen[name] = 128
    wide = law(net, SubAdapter(tuple(chosen.items())), tmp_path, 1e-10)
    assert wide.config.intermediate_size == 128 < GROUPED["intermediate_size"]


def test_a_uniform_model_needs_no_padding():
    net = net_of("llama")
    small = compact(net, sub := net.space.minimal())
    wide = padded(small, net.space, sub)
    assert [p.shape for p in wide.parameters()] == [p.shape for p in small.parameters()]
    assert next(wide.parameters()).data_ptr() == next(small.parameters()).data_ptr()
