"""What saves memory in training changes none of its results."""

import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from elastic.config import AdapterConfig, ModelConfig, StageConfig
from elastic.errors import ConfigError
from elastic.models import loading, requirements
from elastic.supernet.supernet import Supernet
from elastic.training import arguments
from elastic.training.one_task import train_one
from elastic.training.trainer import ElasticTrainer
from tests.helpers import tiny
from tests.helpers.steps import step_gradients
from tests.helpers.tiny import ALPHA, RANK, tokens
from tests.helpers.tiny_runs import assert_same_factors, train_config

OPEN = StageConfig(train_dims=["rank", "width", "heads"], epochs=2)
SETTINGS = {
    "plain": {},
    "accumulated": {"accumulation": 2, "sample_each": "micro_batch"},
    "sandwich": {"sampling": "sandwich", "distill": 0.5},
    "dropout": {"adapter": AdapterConfig(rank=RANK, alpha=ALPHA, dropout=0.3)},
    "bfloat16": {"dtype": "bfloat16", "accumulation": 2},
    "nf4": {"quantise": "nf4", "accumulation": 2},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_checkpointing_trains_the_same_factors(tiny_folder, tmp_path, monkeypatch, kind):
    """To the last bit: what is computed twice is computed alike, with the same sub-adapter."""
    settings = {"stages": [OPEN]} | SETTINGS[kind]
    if settings.get("quantise"):
        pytest.importorskip("bitsandbytes")
    own = {name: settings.pop(name) for name in ("dtype", "quantise") if name in settings}
    model = ModelConfig(path=str(tiny_folder), device="cpu", **{"dtype": "float32"} | own)
    calls, forward = [], LlamaMLP.forward

    def counted(self, x):
        calls.append(torch.is_grad_enabled())
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    runs, counts = [], []
    for name, on in (("kept", False), ("again", True)):
        config = train_config(tiny_folder, tmp_path / name, model=model, **settings)
        runs.append(train_one(dataclasses.replace(config, gradient_checkpointing=on)))
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


# float16


def test_float16_is_not_trained_without_a_loss_scaler(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", pytest.fail)
    model = ModelConfig(path=str(tiny_folder), dtype="float16", device="cpu")
    with pytest.raises(ConfigError, match=r"float16 on cpu.*choose bfloat16 or float32"):
        train_one(train_config(tiny_folder, tmp_path / "run", model=model))
    assert not (tmp_path / "run").exists()


def test_float16_loads_and_keeps_its_factors_wide(tiny_folder):
    model = loading.load_model(
        str(tiny_folder), ModelConfig(path=str(tiny_folder), dtype="float16", device="cpu")
    )
    net = tiny.randomize_(Supernet(model, tiny.space(), AdapterConfig(rank=RANK)))
    assert {tensor.dtype for tensor in net.factor_state().values()} == {torch.float32}
    assert tiny.logits(net.model, tokens()).dtype == torch.float16


def test_float16_asks_for_the_scaler(tiny_folder, tmp_path, monkeypatch):
    """What accelerate does with it needs an accelerator; here only that it is asked."""
    asked = []

    class Stop(Exception):
        pass

    def stopping(**settings):
        asked.append(settings["fp16"])
        raise Stop

    monkeypatch.setattr(arguments, "OneDevice", stopping)
    monkeypatch.setattr(requirements, "require_training", lambda config: None)
    for dtype in ("float16", "bfloat16"):
        model = ModelConfig(path=str(tiny_folder), dtype=dtype, device="cpu")
        with pytest.raises(Stop):
            train_one(train_config(tiny_folder, tmp_path / dtype, model=model))
    assert asked == [True, False]


@pytest.mark.parametrize(
    ("method", "accumulation"), [("lora", 2), ("sorsa", 1), ("sorsa", 2), ("olora", 1)]
)
def test_a_loss_scaler_changes_no_gradient(
    tiny_folder, tmp_path, monkeypatch, method, accumulation
):
    """accelerate's float16 machinery on a float64 model, which autocast leaves alone: scaling by
    a power of two and back is exact, for the task's gradient and for the regulariser's."""
    sizes = {"batch_size": 16 // accumulation, "accumulation": accumulation}
    _, expected = step_gradients(tiny_folder, tmp_path / "plain", method, **sizes)
    scales, init = [], ElasticTrainer.__init__

    def scaled(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        self.accelerator.native_amp = True
        monkeypatch.setattr(self.accelerator.state, "_mixed_precision", "fp16")
        scales.append(self.accelerator.scaler)

    monkeypatch.setattr(ElasticTrainer, "__init__", scaled)
    _, found = step_gradients(tiny_folder, tmp_path / "scaled", method, **sizes)
    assert scales[0].get_scale() == 2.0**12 and found.keys() == expected.keys()
    for name, gradient in expected.items():
        # SOS-LoRA's gate is float32 inside, as published.
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
