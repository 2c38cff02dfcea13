"""The laws once more on SmolLM2-135M-Instruct. Run by hand: make test-slow (three minutes)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elastic.config import AdapterConfig, ModelConfig, TaskConfig
from elastic.data import load_task
from elastic.data.collating import collate
from elastic.data.encoding import encode
from elastic.errors import ModelError
from elastic.exporting.probes import agreement, probe
from elastic.formats import hf, onnx, openvino
from elastic.formats.runner import TorchRunner
from elastic.models import loading
from elastic.models.digest import digest_of
from elastic.spaces.bound import generator_for
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.importance import channel_order
from elastic.supernet.supernet import Supernet
from tests.helpers.tiny import randomize_

pytestmark = pytest.mark.slow
CONFIG = ModelConfig(path="smollm2", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def folder():
    torch.set_num_threads(2)
    try:
        return loading.locate(CONFIG.path)
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def batches(folder):
    tokenizer = loading.load_tokenizer(CONFIG)
    task = load_task(TaskConfig(train_examples=32, validation_examples=1, test_examples=1), 0)
    encoded = [encode(tokenizer, e.prompt, e.answer) for e in task.train]
    return [collate(encoded, tokenizer.pad_token_id)]


def supernet(folder, order: str, batches) -> Supernet:
    model = loading.load_model(folder, CONFIG)
    space = SearchSpace.load("llama")
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    permutation = channel_order(model, space.bind(model, 32), order, inputs)
    return Supernet(model, space, AdapterConfig(rank=32), order=permutation)


def test_the_digest_is_that_of_the_packaged_weights(folder):
    assert digest_of(folder).startswith("sha256:6b54f4a29047134e")


def test_activation_order_keeps_more_of_the_model_than_norm_order(folder, batches):
    """Untrained, half of every MLP cut: how far the next-token distribution moves."""
    distance = {}
    for order in ("activation", "norm"):
        net = supernet(folder, order, batches)
        ids = batches[0]["input_ids"][:, -16:]
        with torch.no_grad():
            full = net.model(ids).logits.log_softmax(-1)
            with net.active(net.space.named("uniform-0.5")):
                half = net.model(ids).logits.log_softmax(-1)
        distance[order] = torch.nn.functional.kl_div(half, full, log_target=True).item()
    assert distance["activation"] < 0.5 * distance["norm"], distance


def test_active_equals_compact_equals_every_written_format(folder, batches, tmp_path):
    net = randomize_(supernet(folder, "activation", batches))
    for layer in (module for module in net.model.modules() if hasattr(module, "adapter")):
        if layer.adapter is not None:
            layer.adapter.B.data.mul_(0.02)  # a realistic update: the model still makes sense
    sub = net.space.random(generator_for(0, "real model"))
    prompts = [batches[0]["input_ids"][row : row + 1, -12:].numpy() for row in range(3)]
    with net.active(sub) as active:
        probes = [probe(active, np.ascontiguousarray(prompt)) for prompt in prompts]
    model = compact(net, sub)
    hf.write(model, None, tmp_path / "hf")
    graph = onnx.write(model, tmp_path / "onnx")
    runners = {
        "compact": TorchRunner(model),
        "hf": TorchRunner(hf.load(tmp_path / "hf", torch.float32)),
        "onnx": onnx.OnnxRunner(graph),
        "openvino": openvino.OpenVINORunner(openvino.write(graph, tmp_path / "openvino")),
    }
    for name, runner in runners.items():
        found = agreement(runner, probes)
        assert found.max_abs_diff <= 2e-4 * found.largest_logit, (name, found)
        assert found.greedy_tokens_equal, (name, found)
