"""What is trained in any family can be searched and written for every runtime."""

import json

import numpy as np
import pytest
import torch

from elastic.config import AdapterConfig, ExportConfig, SearchConfig, StageConfig, TimingConfig
from elastic.exporting.command import export
from elastic.formats import hf, onnx, openvino, peft
from elastic.formats.runner import TorchRunner
from elastic.latency import bench
from elastic.searching.study import search
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.supernet import Supernet
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.clock import drive
from tests.helpers.families import FAMILIES, model_of
from tests.helpers.tiny_runs import ONE_ROUND, fake_measure, train_config

DECODERS = [
    name
    for name, (kind, *_) in FAMILIES.items()
    if kind.endswith(("CausalLM", "LMHeadModel")) and name != "rwkv"
]
WRITTEN = ["gpt2", "bloom"]
"""Of them all, those whose graphs differ from Llama's; `slow` has the others."""


def cut_model(family: str):
    """With other widths in every layer where the choices allow it, float32."""
    net = Supernet(
        model_of(family, torch.float32), SearchSpace.load(FAMILIES[family][1]),
        tiny.ADAPTERS["lora"],
    )  # fmt: skip
    tiny.randomize_(net)
    model = compact(net, net.space.minimal())
    model.config.use_cache = True
    return model


@pytest.mark.parametrize("family", WRITTEN)
def test_every_runtime_computes_the_same(family, tmp_path):
    model, ids = cut_model(family), tiny.tokens(2, 9).numpy()
    expected = drive(TorchRunner(model), ids, 5)
    graph = onnx.write(model, tmp_path)
    for runner in (onnx.OnnxRunner(graph),
                   openvino.OpenVINORunner(openvino.write(graph, tmp_path))):  # fmt: skip
        scale = np.abs(expected).max()
        np.testing.assert_allclose(drive(runner, ids, 5), expected, rtol=0, atol=1e-4 * scale)


def test_peft_adapts_no_layer_of_the_same_name(tmp_path):
    """GPT-2 has a c_proj in its attention, too."""
    net = Supernet(model_of("gpt2"), SearchSpace.load("gpt2"), tiny.ADAPTERS["lora"])
    peft.write(net, net.space.maximal(), tmp_path, base_model="x")
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert sorted(targets) == sorted(net.space.targets)
    short = Supernet(model_of("llama"), SearchSpace.load("llama"), tiny.ADAPTERS["lora"])
    peft.write(short, short.space.maximal(), tmp_path, base_model="x")
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert "q_proj" in targets and len(targets) == 6


@pytest.mark.slow
@pytest.mark.parametrize("family", DECODERS)
def test_every_decoder_goes_all_the_way(family, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure", fake_measure)
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    model = model_of(family, torch.float32)
    model.config.use_cache = True
    hf.write(model, tiny.tokenizer(), tmp_path / "base")
    dims = {spec.dim for spec in SearchSpace.load(FAMILIES[family][1]).sections[0].groups}
    stages = [StageConfig(), StageConfig(train_dims=sorted(dims))]
    run = train_one(train_config(tmp_path / "base", tmp_path / "run", space="auto", stages=stages,
                             adapter=AdapterConfig(rank=8)))  # fmt: skip
    search(SearchConfig(run=str(run.path), trials=4, starts=3, timing=ONE_ROUND, test_front=3))
    once = TimingConfig(prompt_tokens=4, new_tokens=1, rounds=1, max_rounds=1)
    wanted = {"heuristic": ["hf", "onnx", "openvino"], "maximal": ["peft"]}
    for sub, formats in wanted.items():
        report = export(ExportConfig(run=str(run.path), sub_adapter=sub, formats=formats,
                                     timing=once))  # fmt: skip
        for name in formats:
            assert report.contents["formats"][name]["greedy_tokens_equal"], name
