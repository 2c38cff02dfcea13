"""Factors in the matrices of all experts, beside fewer experts and narrower ones."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel

from elastic.formats import peft
from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.supernet.store import load_super_adapter
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import output
from tests.helpers.laws import (
    close,
    every_factor_learns,
    one_function,
    same,
    save,
    several,
    without_data,
)
from tests.helpers.mixtures import ROUNDED, adapted_net, factors_of, model_of

LAID_OUT = ["mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3"]
"""Halves, halves beside dense widths, (in, out) with gate and up in turns and biases, groups."""


def precision(family: str) -> float:
    return 1e-5 if family in ROUNDED else 1e-9


@pytest.mark.parametrize("family", LAID_OUT)
def test_active_sliced_and_merged_are_one_function(family):
    net = adapted_net(family)
    for sub in several(net, draws=2):
        one_function(net, sub, output, precision(family))


@pytest.mark.parametrize("family", LAID_OUT)
def test_every_factor_learns(family):
    every_factor_learns(adapted_net(family, "rank"), output)


@pytest.mark.parametrize("family", LAID_OUT)
def test_saved_and_loaded_on_the_base_it_is_the_same(family, tmp_path):
    net = adapted_net(family)
    save(net, tmp_path / "saved")
    again = load_super_adapter(model_of(family), "sha256:mine", tmp_path / "saved")
    for sub in several(net, draws=1):
        with torch.no_grad(), net.active(sub) as one, again.active(sub) as other:
            close(output(other), output(one))


@pytest.mark.parametrize("family", LAID_OUT)
def test_streamed_from_the_base_it_is_bit_for_bit_the_same(family):
    base = model_of(family)
    net = Supernet(model_of(family), factors_of(family), tiny.ADAPTERS["lora"])
    order = tiny.permutations(net)
    net.reorder(order)
    tiny.randomize_(net)
    same(base, net, without_data(base, net, factors_of(family), "lora", order))


# As an adapter of PEFT


def written(net: Supernet, sub, folder) -> None:
    peft.write(net, sub, folder, base_model="tiny")


def loaded(family: str, folder) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(missing|unexpected|matched|mismatch)")
        return PeftModel.from_pretrained(model_of(family), str(folder)).eval()


@pytest.mark.parametrize("family", LAID_OUT)
def test_as_an_adapter_of_peft_it_is_the_same_function(family, tmp_path):
    """Where channels and experts stand in another order than the base's, and ranks differ."""
    net = adapted_net(family)
    whole = {g.name: g.choices[0] for g in net.space}
    ranks = {g.name: g.choices[-1 if ".0." in g.name else 0] for g in net.space if g.dim == "rank"}
    sub = SubAdapter(tuple((whole | ranks).items()))
    written(net, sub, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    with torch.no_grad(), net.active(sub):
        expected = output(net.model)
        # Channels of another order are summed in another one, and routers round to float32.
        close(output(loaded(family, tmp_path)), expected, 1e-5)
        assert (output(model_of(family)) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("matrices", [["down_proj"], ["gate_up_proj"]])
def test_an_adapter_of_peft_may_have_factors_of_one_matrix_of_some_blocks(matrices, tmp_path):
    space = factors_of("gpt-oss", matrices=matrices).as_dict()
    adapted = [f"mlp.experts.{name}" for name in matrices]
    groups = {name: group for name, group in space["groups"].items() if name != "rank"}
    declared = SearchSpace.from_dict(
        {"blocks": "model.layers.1", "adapt": adapted, "groups": groups}
    )
    net = Supernet(model_of("gpt-oss"), declared, tiny.ADAPTERS["lora"])
    net.reorder(tiny.permutations(net))
    tiny.randomize_(net)
    sub = net.space.maximal()
    written(net, sub, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == [f"model.layers.1.{adapted[0]}"]
    with torch.no_grad(), net.active(sub):
        close(output(loaded("gpt-oss", tmp_path)), output(net.model), 1e-5)


def test_a_cut_mixture_is_no_adapter_of_peft():
    net = adapted_net("mixtral")
    assert "cut the base model itself" in peft.why_not(net, net.space.minimal())
