"""What was written comes back as a base: cut again, it is as if cut for the first time."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from elastic.config import ModelConfig
from elastic.formats import hf
from elastic.formats.runner import runner_of
from elastic.models import loading
from elastic.models.kinds import Kind, kind_of
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import FAMILIES, model_of, output
from tests.helpers.laws import mixed

AGAIN = ["qwen3", "phi3", "gpt2", "bloom", "rwkv", "bert, classes", "t5"]


def cut(model, family):
    net = Supernet(model, SearchSpace.load(FAMILIES[family][1]), tiny.ADAPTERS["lora"])
    tiny.randomize_(net)
    return compact(net, mixed(net))


def write(model, folder):
    if not model.config.is_encoder_decoder:
        model.config.use_cache = True
    return hf.write(model, tiny.tokenizer(), folder, dtype=torch.float32)


def saved(folder):
    return json.loads((folder / "config.json").read_text())


def hf_class(folder):
    return saved(folder)["architectures"][0]


def read(folder):
    labels = saved(folder).get("id2label", {}) if "Classification" in hf_class(folder) else {}
    return ModelConfig(
        path=str(folder), dtype="float32", device="cpu", trust_remote_code=True,
        classes=list(labels.values()),
    )  # fmt: skip


@pytest.mark.parametrize("family", AGAIN)
def test_a_compact_model_is_a_base_like_any_other(family, tmp_path):
    first = cut(model_of(family, torch.float32), family)
    once = write(first, tmp_path / "once")
    assert hf_class(once) == f"Elastic{FAMILIES[family][0]}"
    with torch.device("cpu"):
        base = loading.load_model(str(once), read(once))
    assert type(base) is type(first) and base.config.model_type == first.config.model_type
    torch.testing.assert_close(output(base), output(first))
    assert loading.architecture_of(read(once)).model_type == first.config.model_type
    shapes = {name: layer.weight.shape for name, layer in base.named_modules()
              if isinstance(layer, nn.Linear)}  # fmt: skip
    bare = loading.skeleton(read(once))
    assert type(bare) is type(first) and shapes == {
        name: layer.weight.shape for name, layer in bare.named_modules()
        if isinstance(layer, nn.Linear)
    }  # fmt: skip

    second = cut(base, family)
    twice = write(second, tmp_path / "twice")
    assert hf_class(twice) == hf_class(once)
    torch.testing.assert_close(output(hf.load(twice, torch.float32)), output(second))
    assert sum(p.numel() for p in second.parameters()) < sum(p.numel() for p in first.parameters())


def test_what_is_loaded_again_carries_its_state_on(tmp_path):
    """Of a class of its own, an uneven RWKV was decoded as if it had a cache."""
    model = cut(model_of("rwkv", torch.float32), "rwkv")
    loaded = hf.load(write(model, tmp_path / "rwkv"), torch.float32)
    assert kind_of(loaded) is Kind.RECURRENT
    ids = tiny.tokens(1, 6)
    runner = runner_of(loaded)
    runner.prefill(ids[:, :5].numpy())
    said = torch.from_numpy(runner.decode(ids[:, 5:].numpy()))
    torch.testing.assert_close(said, model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)
