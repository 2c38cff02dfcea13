"""What is trained in any family can be searched and written for every runtime."""

import numpy as np
import pytest
import torch

from elastic import bench
from elastic.config import AdapterConfig, ExportConfig, ModelConfig, StageConfig
from elastic.errors import ExportError, ModelError
from elastic.evaluate import answers
from elastic.exporter import export
from elastic.formats import hf, onnx, openvino
from elastic.merging import compact
from elastic.models import load_model
from elastic.runners import TorchRunner
from elastic.search_config import SearchConfig, TimingConfig
from elastic.space import SearchSpace
from elastic.study import search
from elastic.supernet import Supernet
from elastic.training import train
from tests import tiny
from tests.families import FAMILIES, model_of
from tests.test_latency import drive
from tests.tiny_runs import ONE_ROUND, fake_measure, train_config

DECODERS = [
    name for name, (kind, *_) in FAMILIES.items() if kind.endswith(("CausalLM", "LMHeadModel"))
]
WRITTEN = ["phi3", "gpt2", "gpt-neox", "opt", "bloom"]
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


def test_a_recurrent_model_decodes_from_its_state_and_has_no_graph(tmp_path):
    model, ids = cut_model("rwkv"), tiny.tokens(1, 9)  # of two, transformers mixes the states
    whole = model(ids, use_cache=False).logits[:, 4:].detach().numpy()
    np.testing.assert_allclose(drive(TorchRunner(model), ids.numpy(), 5), whole, atol=1e-4)
    with pytest.raises(ExportError, match="keeps a recurrent state and no KV cache"):
        onnx.write(model, tmp_path)


def test_weights_of_rwkv_are_not_divided_when_it_is_evaluated(tmp_path):
    """Its code halves those of every sixth block, and knows nothing of factors beside them."""
    model = model_of("rwkv", torch.float32)
    model.config.rescale_every = 1
    hf.write(model, None, tmp_path)
    loaded = load_model(str(tmp_path), ModelConfig(dtype="float32", device="cpu"))
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    loaded(tiny.tokens(), use_cache=False)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, before[name]), name


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
    run = train(train_config(tmp_path / "base", tmp_path / "run", space="auto", stages=stages,
                             adapter=AdapterConfig(rank=8)))  # fmt: skip
    search(SearchConfig(run=str(run.path), trials=4, starts=3, timing=ONE_ROUND, test_front=3))
    once = TimingConfig(prompt_tokens=4, new_tokens=1, rounds=1, max_rounds=1)
    wanted = {"heuristic": ["hf"] if family == "rwkv" else ["hf", "onnx", "openvino"],
              "maximal": ["peft"]}  # fmt: skip
    for sub, formats in wanted.items():
        report = export(ExportConfig(run=str(run.path), sub_adapter=sub, formats=formats,
                                     timing=once))  # fmt: skip
        for name in formats:
            assert report.contents["formats"][name]["greedy_tokens_equal"], name


def test_a_recurrent_model_answers_one_by_one():
    """It sees padding, and transformers mixes the states of a batch of single tokens."""
    model, tokenizer = cut_model("rwkv"), tiny.tokenizer()
    prompts = ["Tom has 3 pens", "Ann", "Sam has a book"]
    alone = [answers(model, tokenizer, [prompt], new_tokens=6)[0] for prompt in prompts]
    assert answers(model, tokenizer, prompts, new_tokens=6) == alone
    with pytest.raises(ModelError, match="beams"):
        answers(model, tokenizer, prompts, new_tokens=6, beams=2)
