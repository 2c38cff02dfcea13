"""What saves memory in training changes none of its results."""

import dataclasses

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from elastic.config import AdapterConfig, ModelConfig, StageConfig
from elastic.supernet import Supernet
from elastic.trainer import train
from tests import tiny
from tests.test_trainer import assert_same_factors
from tests.tiny import ALPHA, RANK, tokens
from tests.tiny_runs import train_config

OPEN = StageConfig(train_dims=["rank", "width", "heads"], epochs=2)
SETTINGS = {
    "plain": {},
    "accumulated": {"accumulation": 2, "sample_each": "micro_batch"},
    "sandwich": {"sampling": "sandwich", "distill": 0.5},
    "dropout": {"adapter": AdapterConfig(rank=RANK, alpha=ALPHA, dropout=0.3)},
    "bfloat16": {"dtype": "bfloat16", "accumulation": 2},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_checkpointing_trains_the_same_factors(tiny_folder, tmp_path, monkeypatch, kind):
    """To the last bit: what is computed twice is computed alike, with the same sub-adapter."""
    settings = {"stages": [OPEN]} | SETTINGS[kind]
    own = {name: settings.pop(name) for name in ("dtype",) if name in settings}
    model = ModelConfig(path=str(tiny_folder), device="cpu", **{"dtype": "float32"} | own)
    calls, forward = [], LlamaMLP.forward

    def counted(self, x):
        calls.append(torch.is_grad_enabled())
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    runs, counts = [], []
    for name, on in (("kept", False), ("again", True)):
        config = train_config(tiny_folder, tmp_path / name, model=model, **settings)
        runs.append(train(dataclasses.replace(config, gradient_checkpointing=on)))
        counts.append(sum(calls))
        calls.clear()
    assert_same_factors(*runs)
    assert counts[1] == 2 * counts[0] > 0, "nothing was computed a second time"


def saved_bytes(net: Supernet) -> int:
    """What the forward pass keeps for the backward pass, beside the model itself."""
    own = {t.untyped_storage().data_ptr() for t in (*net.model.parameters(), *net.model.buffers())}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = net.model.model(input_ids=tokens(4, 64), use_cache=False)
    found = sum(storage.nbytes() for address, storage in kept.items() if address not in own)
    output.last_hidden_state.sum().backward()
    return found


def test_checkpointing_keeps_one_tensor_per_layer():
    net = tiny.supernet(num_hidden_layers=8, dtype=torch.float32)
    net.model.train()
    everything = saved_bytes(net)
    net.model.activation_checkpointing_enable({"use_reentrant": False})
    kept = saved_bytes(net)
    entering = 4 * 64 * 32 * 4  # one hidden state in bytes
    assert 8 * entering <= kept < 16 * entering < everything / 8
