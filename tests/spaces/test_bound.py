"""A search space says exactly which sub-adapters exist, and refuses everything else."""

import copy
import itertools
import json
import random

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from elastic.errors import ConfigError, RunError
from elastic.spaces.bound import SubAdapter, all_digits, readable
from elastic.spaces.declared import SearchSpace
from elastic.spaces.dims import GroupSpec
from tests.helpers import tiny


def bound(heads: bool = True, **overrides):
    return tiny.space(heads=heads).bind(tiny.llama(**overrides), tiny.RANK)


LLAMA = tiny.llama()
BOUND = bound()


def declared(**groups) -> dict:
    """The tiny space with these groups changed: a mapping is merged in, None removes."""
    value = copy.deepcopy(tiny.space_dict(heads=True))
    for name, change in groups.items():
        if change is None:
            del value["groups"][name]
        else:
            value["groups"][name] = {**value["groups"].get(name, {}), **change}
    return value


def bind(value: dict, max_rank: int = tiny.RANK):
    return SearchSpace.from_dict(value, "mine.yaml").bind(LLAMA, max_rank)


# What a space holds


def test_size_is_the_product_of_choices_and_counts_distinct_points():
    value = declared(mlp_width=None, mlp_rank={"choices": [8, 4]}, attention_rank=None)
    space = bind(value)  # per layer two ranks and two numbers of heads
    names = [group.name for group in space]
    counts = [range(len(group.choices)) for group in space]
    points = {
        space.at(dict(zip(names, indices, strict=True))) for indices in itertools.product(*counts)
    }
    assert space.size == 2**2 * 2**2 == len(points)
    assert BOUND.size == (3 * 4 * 3 * 2) ** 2


def test_choices_are_absolute_and_descend_from_the_full_size():
    choices = {g.name: g.choices for g in BOUND if g.name.startswith("model.layers.1.")}
    assert choices == {
        "model.layers.1.attention_rank": (8, 4, 1),
        "model.layers.1.mlp_width": (64, 48, 32, 16),
        "model.layers.1.mlp_rank": (8, 5, 2),
        "model.layers.1.attention_heads": (2, 1),
    }


def test_a_choice_of_heads_moves_whole_heads():
    (group,) = [g for g in BOUND if g.name == "model.layers.0.attention_heads"]
    units = {(cut.site.rpartition(".")[2], cut.axis): cut.unit for cut in group.cuts}
    assert units == {
        ("q_proj", "out"): 16,  # two query heads of size 8 share one key-value head
        ("k_proj", "out"): 8,
        ("v_proj", "out"): 8,
        ("o_proj", "in"): 16,
    }


def test_the_full_size_is_a_choice_even_when_undeclared():
    space = bind(declared(mlp_width={"choices": [16]}, mlp_rank={"choices": [0.5]}))
    assert {g.choices for g in space if g.name.endswith("mlp_width")} == {(64, 16)}
    assert {g.choices for g in space if g.name.endswith("mlp_rank")} == {(8, 4)}


@given(
    full=st.integers(1, 400),
    fraction=st.floats(0.001, 1.0),
    align=st.sampled_from([1, 8, 64]),
)
def test_a_fraction_is_the_nearest_multiple_of_align(full, fraction, align):
    spec = GroupSpec("g", "width", (fraction,), align=align)
    sizes = spec.resolve(full, "here")
    assert sizes[0] == full and len(sizes) <= 2
    chosen = sizes[-1]
    if chosen != full:
        assert chosen % align == 0 and chosen >= 1
        assert abs(chosen - fraction * full) <= max(align / 2, align - fraction * full) + 1e-9


@pytest.mark.parametrize("full", [80, 85, 100, 64])
def test_fraction_one_is_the_full_size_also_when_not_aligned(full):
    assert GroupSpec("g", "width", (1.0,), align=64).resolve(full, "here") == (full,)


def test_duplicate_choices_count_once():
    space = bind(declared(mlp_rank={"choices": [1.0, 8, 0.5, 4, 4]}))
    assert {g.choices for g in space if g.name.endswith("mlp_rank")} == {(8, 4)}


# Points


def is_point(space, sub) -> bool:
    return space.check(sub) == sub


def test_named_points():
    maximal, minimal, heuristic = BOUND.maximal(), BOUND.minimal(), BOUND.heuristic()
    for group in BOUND:
        assert maximal[group.name] == max(group.choices)
        assert minimal[group.name] == min(group.choices)
        assert heuristic[group.name] == group.choices[(len(group.choices) - 1) // 2]
    assert heuristic["model.layers.0.mlp_width"] == 48  # four choices: index 1
    assert heuristic["model.layers.0.attention_heads"] == 2  # two choices: index 0
    for name in ("maximal", "minimal", "heuristic"):
        assert BOUND.named(name) == getattr(BOUND, name)()
    assert BOUND.named("random", seed=3) == BOUND.random(random.Random(3))
    assert BOUND.named("uniform-.5") == BOUND.uniform(0.5)
    with pytest.raises(RunError, match="unknown sub-adapter 'maximl'; did you mean 'maximal'"):
        BOUND.named("maximl")
    for name in ("uniform-0", "uniform-1.5", "uniform-2"):
        with pytest.raises(RunError, match=f"unknown sub-adapter '{name}'"):
            BOUND.named(name)


@given(st.floats(0, 1.2))
def test_uniform_takes_the_nearest_choice(fraction):
    sub = BOUND.uniform(fraction)
    assert is_point(BOUND, sub)
    for group in BOUND:
        goal = fraction * group.choices[0]
        best = min(abs(choice - goal) for choice in group.choices)
        assert abs(sub[group.name] - goal) == best


@given(st.integers(0, 2**32))
def test_draws_are_points_and_functions_of_the_generator(seed):
    for draw in (BOUND.random, BOUND.stratified):
        sub = draw(random.Random(seed))
        assert is_point(BOUND, sub)
        assert draw(random.Random(seed)) == sub


def test_every_dimension_has_a_target_of_its_own():
    """Deployments ask for a small width at full rank: such sub-adapters are drawn."""
    draws = [BOUND.stratified(random.Random(seed)) for seed in range(400)]
    narrow = {g.name: g.choices[-1] for g in BOUND if g.dim == "width"}
    full = {g.name: g.choices[0] for g in BOUND if g.dim == "rank"}
    both = [d for d in draws if all(d[name] == c for name, c in (narrow | full).items())]
    assert both


def test_ladder_descends_from_maximal_to_minimal():
    rungs = BOUND.ladder()
    assert (rungs[0], rungs[-1]) == (BOUND.maximal(), BOUND.minimal())
    assert len(set(rungs)) == len(rungs) == max(len(group.choices) for group in BOUND)
    for upper, lower in itertools.pairwise(rungs):
        assert is_point(BOUND, lower)
        assert all(upper[group.name] >= lower[group.name] for group in BOUND)


def test_a_space_without_groups_has_one_point():
    space = bind({**declared(), "groups": {}})
    assert space.size == 1
    assert space.ladder() == [space.maximal()] == [SubAdapter(())]


@given(st.data())
def test_indices_invert_at(data):
    indices = {g.name: data.draw(st.integers(0, len(g.choices) - 1)) for g in BOUND}
    assert BOUND.indices(BOUND.at(indices)) == indices


@given(st.integers(0, 2**32))
def test_sub_adapter_survives_json(tmp_path_factory, seed):
    sub = BOUND.random(random.Random(seed))
    file = tmp_path_factory.mktemp("sub") / "sub.json"
    file.write_text(str(sub))
    back = SubAdapter.read(file)
    assert back == sub and hash(back) == hash(sub) and {back: 1}[sub] == 1
    file.write_text(json.dumps({"sub_adapter": sub.as_dict(), "accuracy": 0.5}))
    assert SubAdapter.read(file) == sub


@pytest.mark.parametrize("text", ["[1]", '{"a": "8"}', '{"a": 8.0}', '{"a": true}', "{", ""])
def test_what_is_no_sub_adapter_is_refused(tmp_path, text):
    file = tmp_path / "sub.json"
    file.write_text(text)
    with pytest.raises(RunError, match=r"sub\.json"):
        SubAdapter.read(file)


def test_check_orders_and_rejects():
    sub = BOUND.heuristic()
    backwards = SubAdapter(tuple(reversed(sub.choices)))
    assert backwards != sub and BOUND.check(backwards) == sub
    choices = sub.as_dict()
    with pytest.raises(RunError, match=r"differ in 1 groups: strange"):
        BOUND.check(SubAdapter((*sub.choices, ("strange", 1))))
    with pytest.raises(RunError, match="differ in 1 groups"):
        BOUND.check(SubAdapter(sub.choices[1:]))
    choices["model.layers.0.mlp_rank"] = 3
    with pytest.raises(RunError, match=r"layers\.0\.mlp_rank is 3; choose from \[8, 5, 2\]"):
        BOUND.check(SubAdapter(tuple(choices.items())))
    with pytest.raises(RunError):
        BOUND.indices(SubAdapter(tuple(choices.items())))


# Declarations


@pytest.mark.parametrize("heads", [False, True])
def test_declaration_survives_dict_and_yaml(heads):
    space = tiny.space(heads=heads)
    assert space.as_dict() == tiny.space_dict(heads=heads)
    text = yaml.safe_dump(space.as_dict(), sort_keys=False)
    again = SearchSpace.from_dict(yaml.safe_load(text))
    assert again == space
    assert again.bind(LLAMA, tiny.RANK) == space.bind(LLAMA, tiny.RANK)


def test_sections_must_not_cut_the_same_layer_twice():
    value = tiny.space_dict()
    with pytest.raises(ConfigError, match="is cut by both"):
        bind([value, {**value, "groups": {"other": value["groups"]["mlp_rank"]}}])
    with pytest.raises(ConfigError, match=r"mine\.yaml: expected a mapping"):
        bind([value, "more"])
    with pytest.raises(ConfigError, match=r"mine\.yaml: expected a mapping"):
        bind([])


def test_binding_to_meta_tensors_is_the_same():
    with torch.device("meta"):
        model = type(LLAMA)(tiny.config())
    assert tiny.space(heads=True).bind(model, tiny.RANK) == BOUND


def test_broken_yaml_names_the_file(tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text("blocks: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml:2: broken YAML"):
        SearchSpace.load(str(file))


GROUP = "mine.yaml: group 'mlp_rank': "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groops": {}}, "unknown key 'groops'; did you mean 'groups'"),
        ({"groups": []}, "groups"),
        ({"blocks": 3}, "blocks"),
        ({"adapt": "mlp.up_proj"}, "adapt"),
        ({"adapt": []}, "adapt"),
    ],
)
def test_faults_of_the_space(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        SearchSpace.from_dict({**declared(), **change}, "mine.yaml")
    assert str(caught.value).startswith("mine.yaml: ")


@pytest.mark.parametrize("value", [None, [], "llama", {"blocks": "model.layers.*", "adapt": []}])
def test_what_is_no_space_is_refused(value):
    with pytest.raises(ConfigError, match="groups"):
        SearchSpace.from_dict(value, "mine.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice": [1]}, "unknown key 'choice'; did you mean 'choices'"),
        ({"outputs": ["mlp.up_proj"]}, "unknown key 'outputs'"),
        ({"dim": "rnk"}, "unknown dim 'rnk'; did you mean 'rank'"),
        ({"dim": ["rank"]}, "unknown dim"),
        ({"choices": []}, "choices is []; give a list"),
        ({"choices": 8}, "choices is 8; give a list"),
        ({"choices": ["8"]}, "choice '8'"),
        ({"choices": [True]}, "choice True"),
        ({"choices": [0]}, "choice 0"),
        ({"choices": [0.0]}, "choice 0.0"),
        ({"choices": [1.5]}, "choice 1.5"),
        ({"choices": [float("nan")]}, "choice nan"),
        ({"align": 0}, "align is 0"),
        ({"align": 2.0}, "align is 2.0"),
        ({"of": "mlp.up_proj"}, "of is 'mlp.up_proj'; give a list"),
        ({"of": []}, "of is []; give a list"),
    ],
)
def test_faults_of_a_group(change, message):
    with pytest.raises(ConfigError) as caught:
        SearchSpace.from_dict(declared(mlp_rank=change), "mine.yaml")
    assert str(caught.value).startswith(GROUP) and message in str(caught.value)


def test_a_group_needs_its_keys():
    value = declared()
    del value["groups"]["mlp_rank"]["choices"], value["groups"]["mlp_rank"]["of"]
    with pytest.raises(ConfigError, match=r"group 'mlp_rank': missing \['choices', 'of'\]"):
        SearchSpace.from_dict(value, "mine.yaml")
    for group in (None, ["rank"], "rank"):
        with pytest.raises(ConfigError, match="group 'mlp_rank': unknown dim 'None'"):
            SearchSpace.from_dict({**declared(), "groups": {"mlp_rank": group}}, "mine.yaml")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({**declared(), "blocks": "model.layer.*"},
         "mine.yaml: blocks 'model.layer.*' matches nothing in LlamaForCausalLM; "
         "its modules are model"),
        ({**declared(), "adapt": ["self_attn.query"]},
         "mine.yaml: adapt: 'model.layers.0.self_attn.query' matches no linear layer"),
        ({**declared(), "adapt": ["input_layernorm"]}, "matches no linear layer"),
        (declared(mlp_rank={"of": ["mlp.upp"]}),
         GROUP + "'model.layers.0.mlp.upp' matches no linear layer"),
        (declared(mlp_rank={"of": ["self_attn.o_proj"]}),
         "'model.layers.0.self_attn.o_proj' matches no adapted layer (see `adapt`)"),
        (declared(mlp_rank={"choices": [48]}),
         GROUP + "rank 48 exceeds the super-adapter's max_rank 8; choose from 1..8, "
         "or train with adapter.rank=48"),
        (declared(mlp_width={"choices": [128]}),
         "group 'mlp_width': width 128 exceeds the full size 64; choose from 1..64"),
        (declared(mlp_width={"choices": [33]}),
         "group 'mlp_width': width 33 is not divisible by align 8; nearest: 32"),
        (declared(attention_heads={"choices": [4]}), "heads 4 exceeds the full size 2"),
        (declared(attention_heads={"dim": "width", "choices": [12]}),
         "model.layers.0.self_attn.q_proj belongs to attention and 12 is not divisible by the "
         "head size 8; declare it with `dim: heads`"),
        (declared(attention_heads={"dim": "width", "choices": [16]}), "`dim: heads`"),
        (declared(mlp_width={"dim": "heads"}), "model.layers.0.mlp.gate_proj is not in attention"),
        (declared(mlp_width={"inputs": ["mlp.up_proj"]}),
         "group 'mlp_width': sites of one width differ in size: "
         "model.layers.0.mlp.gate_proj (out) 64"),
        (declared(again={"dim": "rank", "of": ["mlp.up_proj"], "choices": [4]}),
         "model.layers.0.mlp.up_proj (rank) is cut by both 'model.layers.0.mlp_rank' and "
         "'model.layers.0.again'"),
        (declared(again={"dim": "width", "outputs": ["mlp.up_proj"], "inputs": ["mlp.down_proj"],
                         "choices": [16]}),
         "model.layers.0.mlp.up_proj (out) is cut by both"),
    ],
)  # fmt: skip
def test_faults_of_the_fit_to_a_model(value, message):
    with pytest.raises(ConfigError) as caught:
        bind(value)
    assert message in str(caught.value)


def test_nearest_aligned_size_is_never_zero():
    with pytest.raises(ConfigError, match="nearest: 8"):
        bind(declared(mlp_width={"choices": [3]}))


def test_counts_past_every_float_are_powers_of_ten():
    assert (readable(1), readable(625)) == ("1", "625")
    assert (readable(999_999), readable(1_234_567)) == ("999,999", "1.2e+6")
    assert readable(3**1000) == "1.3e+477"
    assert readable(10**5000) == "1.0e+5000"
    assert all_digits(10**5000) == "1" + 5000 * "0"
    assert all_digits(3**10) == "59049"
