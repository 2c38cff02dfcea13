"""What a loss does not reach is told once, and what a model refuses to be trained on is a line."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP

from elastic.config import AdapterConfig, StageConfig
from elastic.errors import ConfigError, ModelError
from elastic.supernet.discovery import called
from elastic.supernet.supernet import Supernet
from elastic.training.gradients import unreached
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.families import model_of
from tests.helpers.tiny_runs import space_file, train_config
from tests.zoo.building import config_of
from tests.zoo.building import model_of as random_model

DEEP = {"dim": "depth", "choices": [1.0, 0.5], "drop_ends": True}
REACHED = "the loss reached none"


def looked_at(self, x):
    """An MLP one of whose layers decides, as indices do, and gives nothing else."""
    return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) > 0))


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_layers_out_of_the_loss_s_reach_are_told_once(
    tiny_folder, tmp_path, monkeypatch, capsys, accumulation
):
    monkeypatch.setattr(LlamaMLP, "forward", looked_at)
    train_one(train_config(tiny_folder, tmp_path / "run", order="none", accumulation=accumulation))
    words = said(capsys)
    assert words.count(REACHED) == 1
    assert f"{REACHED} of the factors of 2 adapted layers: model.layers.*.mlp.up_proj." in words


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_nothing_is_told_where_all_is_reached(tiny_folder, tmp_path, capsys, method):
    """By whatever factor: some start at zero, and keep others from a gradient in the first step;
    what pulls at factors themselves is no loss."""
    stages = [StageConfig(epochs=1)]
    train_one(train_config(tiny_folder, tmp_path / method, adapter=tiny.ADAPTERS[method],
                           stages=stages, max_steps=1))  # fmt: skip
    assert REACHED not in said(capsys)


def test_blocks_that_did_not_run_are_not_asked(tiny_folder):
    declared = tiny.space_dict()
    space = tiny.supernet().declared.from_dict(
        declared | {"groups": {"depth": DEEP, **declared["groups"]}}
    )
    net = Supernet(model_of("llama", torch.float32), space, AdapterConfig(rank=tiny.RANK))
    for _, adapter in net.adapters():
        adapter.requires_grad_(True)
    sub = net.space.minimal()
    [gone] = net.space.left_out(sub)
    with net.active(sub) as model:
        model(tiny.tokens()).logits.sum().backward()
    assert unreached(net, [sub]) == []
    assert unreached(net, [sub, net.space.maximal()])[0].startswith(gone)
    assert len(unreached(net, [net.space.maximal()])) == len(net.space.targets) // 2


def test_texts_that_a_model_refuses_in_training_are_a_line(tiny_folder, tmp_path, monkeypatch):
    forward = LlamaForCausalLM.forward

    def refusing(self, *args, **kwargs):
        if self.training and kwargs["input_ids"].shape[1] > 4:
            raise ValueError("If training, the length\nhas to be 4.")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", refusing)
    message = r"Llama.* refuses a batch of \d+ tokens in training; its own code says If training"
    with pytest.raises(ModelError, match=message):
        train_one(train_config(tiny_folder, tmp_path / "run", order="none",
                               space=space_file(tmp_path, tiny.space_dict())))  # fmt: skip


def test_a_model_that_trains_at_one_length_alone_is_refused_before_weights_load():
    """Reformer with its usual positions."""
    config = config_of("reformer", "causal")
    config.update({"axial_pos_embds": True, "axial_pos_shape": (8, 8),
                   "axial_pos_embds_dim": (16, 16)})  # fmt: skip
    model = random_model(config, "causal", torch.float32)
    with pytest.raises(ConfigError, match="own code says ValueError: If training, make sure"):
        called(model)
    assert not model.training
