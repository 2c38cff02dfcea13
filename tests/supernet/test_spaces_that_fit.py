"""Spaces that do not fit together are refused by the model's own code, before weights load."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from elastic.config import SpaceShowConfig
from elastic.errors import ConfigError
from elastic.spaces.declared import SearchSpace
from elastic.supernet.discovery import called, discover, refusal, require_fits
from elastic.supernet.summary import show_space
from elastic.training.dry_run import estimate
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.families import FAMILIES, model_of
from tests.helpers.tiny_runs import space_file, train_config

WIDTH = {"dim": "width", "outputs": ["mlp.gate_proj", "mlp.up_proj"], "inputs": ["mlp.down_proj"],
         "choices": [1.0, 0.5]}  # fmt: skip
HEADS = {"dim": "heads", "outputs": [f"self_attn.{name}_proj" for name in "qkv"],
         "inputs": ["self_attn.o_proj"], "choices": [1.0, 0.5]}  # fmt: skip
BROKEN = {
    "no up_proj": {**WIDTH, "outputs": ["mlp.gate_proj"]},
    "turned round": {**WIDTH, "outputs": ["mlp.down_proj"], "inputs": ["mlp.gate_proj"]},
    "no v_proj": {**HEADS, "outputs": ["self_attn.q_proj", "self_attn.k_proj"]},
}


def declared(group):
    return tiny.space_dict() | {"groups": {"cut": group}}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_shipped_space_fits(family):
    model = model_of(family, torch.float32)
    require_fits(model.to("meta"), SearchSpace.load(FAMILIES[family][1]), 8)


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("order", ["none", "auto"])
def test_groups_that_are_not_whole_are_refused_before_weights_load(
    tiny_folder, tmp_path, broken, order
):
    message = "runs whole, but not cut to the smallest choices: .*Error"
    file = space_file(tmp_path / "space", declared(BROKEN[broken]))
    config = train_config(tiny_folder, tmp_path / "run", space=file, order=order)
    with pytest.raises(ConfigError, match=message):
        train_one(config)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=message):
        estimate(config)
    with pytest.raises(ConfigError, match=message):
        show_space(SpaceShowConfig(space=file, model=config.model, rank=8))


@pytest.mark.parametrize("value, message", [
    (declared({**WIDTH, "outputs": [*WIDTH["outputs"], "mlp.up_proj"]}),
     "group 'cut': outputs: 'mlp.up_proj' stands there twice"),
    (declared(WIDTH) | {"adapt": ["mlp.up_proj"] * 2}, "adapt: 'mlp.up_proj' stands there twice"),
])  # fmt: skip
def test_a_layer_named_twice_is_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        SearchSpace.from_dict(value)


class Reads(LlamaMLP):
    """Its weight is read, not called, as Mamba does it."""

    def forward(self, x):
        made = nn.functional.linear(x, self.up_proj.weight)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * made)


class NeedsValues(LlamaMLP):
    def forward(self, x):
        return super().forward(x * float(x.sum()))


def llama(mlp):
    model = model_of("llama", torch.float32)
    for layer in model.model.layers:
        layer.mlp.__class__ = mlp
    return model


def test_layers_that_are_never_called_get_no_factors():
    model = llama(Reads)
    assert "model.layers.0.mlp.up_proj" not in called(model)
    with pytest.raises(ConfigError, match=r"never calls 'model.layers.0.mlp.up_proj'.* leave it"):
        require_fits(model, SearchSpace.load("llama"), 8)
    [section] = discover(model).sections
    assert "mlp.gate_proj" in section.adapt and "mlp.up_proj" not in section.adapt


def test_a_model_that_needs_values_is_not_judged():
    model = llama(NeedsValues)
    space = SearchSpace.from_dict(declared(BROKEN["no up_proj"]))
    assert called(model) is None and refusal(model, space, 8)
    require_fits(model, space, 8)


def test_nothing_is_logged_of_a_trial(caplog):
    space = SearchSpace.from_dict(declared(BROKEN["turned round"]))
    assert refusal(model_of("llama", torch.float32), space, 8) and caplog.text == ""
