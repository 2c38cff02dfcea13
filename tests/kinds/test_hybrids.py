"""Families whose blocks are of several kinds: what is found in them obeys the laws."""

from __future__ import annotations

import contextlib
import random
import sys

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.lfm2.modeling_lfm2 import Lfm2Attention

from elastic.config import ModelConfig
from elastic.errors import ConfigError, ModelError
from elastic.formats import hf
from elastic.models.requirements import require_graph, require_packing
from elastic.spaces.declared import SearchSpace
from elastic.spaces.dims import places
from elastic.supernet.compact import compact
from elastic.supernet.discovery import called, discover
from elastic.supernet.few import FEW
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import output
from tests.helpers.hybrids import HYBRIDS, hybrid, runnable_, save_hybrid
from tests.helpers.laws import close, one_function

ALTERNATING = ["linear_attention", "full_attention"]
GENERATED = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": tiny.PAD}
PRECISION = 1e-5
"""Norms, routers and scans round to float32, whatever the type."""


def goes_on_alike(net, sub, small: PreTrainedModel, expected: torch.Tensor, folder) -> None:
    """Written and loaded again it is the same function, and all three generate the same tokens."""
    again = runnable_(hf.load(hf.write(small, None, folder), torch.float64))
    close(output(again), expected, PRECISION)
    with net.active(sub):
        tokens = net.model.generate(tiny.tokens(2, 6), **GENERATED)
    assert torch.equal(small.generate(tiny.tokens(2, 6), use_cache=False, **GENERATED), tokens)
    assert torch.equal(again.generate(tiny.tokens(2, 6), **GENERATED), tokens)


@pytest.mark.parametrize("family", HYBRIDS)
def test_active_sliced_merged_and_reloaded_are_one_function(family, tmp_path):
    base = hybrid(family)
    net = Supernet(hybrid(family), discover(base), tiny.ADAPTERS["lora"])
    assert {group.dim for group in net.space} >= {"heads", "rank", "width"}
    with torch.no_grad():
        net.reorder(tiny.permutations(net))
        full = output(base)
        close(output(net.model), full, PRECISION)
        tiny.randomize_(net)
        for sub in (net.space.minimal(), net.space.random(random.Random(1))):
            expected, small = one_function(net, sub, output, PRECISION)
            assert (expected - full).abs().max() > 1e-3 * full.abs().max()
        goes_on_alike(net, sub, small, expected, tmp_path)


DEEP = {
    "deepseek-v3": {"num_hidden_layers": 6, "first_k_dense_replace": 3},
    "llama4": {"num_hidden_layers": 7, "no_rope_layers": [1, 0, 1, 1, 0, 1, 0]},
    "qwen3-next": {"num_hidden_layers": 7, "layer_types": ALTERNATING * 3 + ALTERNATING[:1]},
    "lfm2": {"num_hidden_layers": 7, "layer_types": ["conv", "full_attention"] * 3 + ["conv"]},
    "bamba": {"num_hidden_layers": 7, "attn_layer_indices": [1, 3, 5]},
    "afmoe": {"num_hidden_layers": 6, "num_dense_layers": 3, "global_attn_every_n_layers": 2},
    "jamba": {"num_hidden_layers": 6, "expert_layer_period": 7, "expert_layer_offset": 6},
}
"""How the configuration says which block is of which kind: how many first ones, by list, by
number; Jamba's by a rule."""


def with_depths(family: str, choices: list) -> tuple[PreTrainedModel, SearchSpace]:
    """What is found, and how many blocks of each kind run."""
    base = hybrid(family, **DEEP[family])
    sections = discover(base).as_dict()
    for section in sections:
        section["groups"]["depth"] = {"dim": "depth", "choices": choices}
    return base, SearchSpace.from_dict(sections)


@pytest.mark.parametrize("family", [family for family in DEEP if family != "jamba"])
def test_blocks_of_every_kind_may_be_left_out(family, tmp_path):
    base, space = with_depths(family, [1.0, 2])
    blocks = {number: type_of(block) for number, block in enumerate(base.model.layers)}
    net = Supernet(base, space, tiny.ADAPTERS["lora"])
    orders = tiny.permutations(net)
    for group in net.space.depths:  # of those that may go, the last ones stay
        own = sorted(places(group.blocks))
        ends = sorted(places(group.blocks)[: group.staying])
        orders[group.name] = torch.tensor([*ends, *(n for n in reversed(own) if n not in ends)])
    net.reorder(orders)
    tiny.randomize_(net)
    sub = net.space.minimal()
    [kept] = net.space.kept(sub).values()
    assert len(kept) == 4 and [0, len(blocks) - 1] == [kept[0], kept[-1]]
    with torch.no_grad():
        full = output(net.model)
        expected, small = one_function(net, sub, output, PRECISION)
        assert (expected - full).abs().max() > 1e-3 * full.abs().max()
        close(output(net.model), full, 1e-12)  # as before
        assert [type_of(block) for block in small.model.layers] == [blocks[n] for n in kept]
        goes_on_alike(net, sub, small, expected, tmp_path)


def type_of(block: nn.Module) -> list[str]:
    """What it is made of."""
    return sorted(type(module).__name__ for module in block.children())


def test_blocks_of_a_kind_that_a_rule_gives_stay():
    """Attention in every second block, whatever runs."""
    base, space = with_depths("jamba", [1.0, 2])
    with pytest.raises(ConfigError, match=r"built otherwise.*by a rule that knows no gaps"):
        space.bind(base, tiny.RANK)


def test_kinds_of_one_list_go_in_orders_of_their_own():
    base, space = with_depths("lfm2", [1.0, 2])
    order = {"model.layers.{0,2,4,6}.depth": [3, 0, 2, 1], "model.layers.{1,3,5}.depth": [1, 2, 0]}
    bound = space.bind(base, tiny.RANK)
    bound = bound.ordered({name: torch.tensor(places) for name, places in order.items()})
    assert bound.kept(bound.minimal()) == {"model.layers": [0, 3, 5, 6]}
    assert sorted(bound.left_out(bound.minimal())) == [f"model.layers.{n}." for n in (1, 2, 4)]
    assert bound.indices(bound.minimal()) == {
        group.name: 0 if bound.minimal()[group.name] == 0 else len(group.choices) - 1
        for group in bound
    }


def test_one_kind_may_have_a_depth_beside_one_that_has_none():
    base, space = with_depths("lfm2", [1.0, 2])
    sections = space.as_dict()
    del sections[1]["groups"]["depth"]
    net = Supernet(base, SearchSpace.from_dict(sections), tiny.ADAPTERS["lora"])
    tiny.randomize_(net)
    assert net.space.kept(net.space.minimal()) == {"model.layers": [0, 1, 3, 5, 6]}
    with torch.no_grad():
        one_function(net, net.space.minimal(), output, PRECISION)


def test_depths_are_found_where_they_are_asked_for(capsys):
    lfm2, jamba = (hybrid(family, **DEEP[family]) for family in ("lfm2", "jamba"))
    assert not any(spec.dim == "depth" for s in discover(lfm2).sections for spec in s.groups)
    for section in discover(lfm2, deep=True).sections:
        assert section.groups[0].dim == "depth"
    capsys.readouterr()
    found = discover(jamba, deep=True)
    assert not any(spec.dim == "depth" for s in found.sections for spec in s.groups)
    said = " ".join(capsys.readouterr().err.split())
    assert "leaves out depth of model.layers.{0,2,4}" in said and "knows no gaps" in said


def test_what_is_found_is_told_in_a_table(capsys):
    discover(hybrid("qwen3-next"))
    told = capsys.readouterr().err
    [mixing] = [line for line in told.splitlines() if "Qwen3NextGatedDeltaNet" in line]
    assert mixing.split()[1] == "model.layers.{0,2}" and mixing.split()[3] == "2"
    said = " ".join(told.split())
    assert "of model.layers.{0,2}.linear_attn ranks alone are elastic" in said
    assert "model.layers.{0,2}.mlp.experts, model.layers.{1,3}.mlp.experts are not" in said


@pytest.mark.parametrize("family, layer", [("bamba", "mamba.out_proj"), ("jamba", "mamba.dt_proj")])
def test_a_weight_that_fused_kernels_read_carries_no_factors(family, layer):
    """They would do nothing there."""
    adapted = {name for section in discover(hybrid(family)).sections for name in section.adapt}
    assert layer not in adapted and "mamba.in_proj" in adapted


def test_a_router_that_answers_with_more_than_its_product_carries_no_factors():
    model = hybrid("llama4")
    assert "model.layers.1.feed_forward.router" not in called(model)
    assert "model.layers.1.feed_forward.shared_expert.up_proj" in called(model)


def test_a_trial_runs_a_few_blocks_of_each_kind(monkeypatch):
    """Or models of many would take minutes."""
    runs = []
    monkeypatch.setattr(
        Lfm2Attention, "forward", counted(Lfm2Attention.forward, runs)
    )  # fmt: skip
    discover(hybrid("lfm2", num_hidden_layers=24, layer_types=["conv", "full_attention"] * 12))
    assert len(runs) == 3 * FEW  # as it is, in evaluation and in training, and at its smallest


def counted(forward, runs):
    def run(self, *arguments, **given):
        runs.append(self)
        return forward(self, *arguments, **given)

    return run


def test_binding_takes_as_long_for_every_further_block():
    def calls(blocks: int) -> int:
        model = hybrid("lfm2", num_hidden_layers=blocks, layer_types=["conv"] * blocks)
        space, seen = SearchSpace.from_dict(SPACE), [0]

        def count(frame, event, argument):
            seen[0] += 1

        sys.setprofile(count)
        try:
            space.bind(model, tiny.RANK)
        finally:
            sys.setprofile(None)
        return seen[0]

    few, more, most = (calls(blocks) for blocks in (8, 16, 32))
    assert most - more == pytest.approx(2 * (more - few), rel=0.02)


SPACE = {
    "blocks": "model.layers.*",
    "adapt": ["conv.in_proj", "feed_forward.w1", "feed_forward.w3"],
    "groups": {"rank": {"dim": "rank", "of": ["conv.in_proj"], "choices": [1.0, 0.5]}},
}


def test_buffers_that_are_in_no_file_are_filled_when_a_folder_is_loaded(tmp_path):
    """Falcon-H1 fills them where it begins, which a class from elsewhere would skip."""
    net = Supernet(hybrid("falcon-h1"), discover(hybrid("falcon-h1")), tiny.ADAPTERS["lora"])
    small = compact(net, net.space.random(random.Random(1)))
    folder = hf.write(small, None, tmp_path)
    assert (folder / hf.CODE).exists()
    again = hf.load(folder, torch.float64)
    for mine, other in zip(small.model.layers, again.model.layers, strict=True):
        assert torch.equal(mine.mamba.mup_vector, other.mamba.mup_vector.double())
        assert len(set(mine.mamba.mup_vector.flatten().tolist())) == 5


@pytest.mark.parametrize("family", ["qwen3-next", "deepseek-v3"])
def test_query_heads_that_hold_more_than_queries_are_refused(family):
    """Gates, or a size that is not that of the values."""
    made = {"qwen3-next": "q_proj", "deepseek-v3": "q_b_proj"}[family]
    group = {"dim": "query_heads", "outputs": [f"self_attn.{made}"],
             "inputs": ["self_attn.o_proj"], "choices": [1]}  # fmt: skip
    value = {"blocks": "model.layers.{1,3}", "adapt": [f"self_attn.{made}"]}
    space = SearchSpace.from_dict(value | {"groups": {"queries": group}})
    with pytest.raises(ConfigError, match="its query heads hold more than queries"):
        space.bind(hybrid(family), tiny.RANK)


STATES = {"lfm2": True, "falcon-h1": True, "jamba": True, "deepseek-v3": False, "llama4": False}


@pytest.mark.parametrize("family, passes_on", STATES.items())
def test_a_state_that_blocks_pass_on_is_known(family, passes_on, tmp_path):
    """Sequences cannot share a row, and no graph of keys and values is written."""
    folder = ModelConfig(path=str(save_hybrid(tmp_path, family)))
    refused = pytest.raises((ConfigError, ModelError), match="state")
    for require in (require_packing, lambda config: require_graph(config, "onnx")):
        with refused if passes_on else contextlib.nullcontext():
            require(folder)
