"""Graphs above the 2 GiB at which protobuf ends, written, converted and compressed for real."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, T5Config

from elastic.formats import compression, onnx, openvino
from elastic.formats.runner import runner_of

pytestmark = pytest.mark.slow  # a few minutes and 10 GiB of memory each

PROMPT, NEXT = np.array([[5, 6, 7, 8, 9]]), np.array([[3]])


def llama():
    config = LlamaConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=24, num_attention_heads=20,
        num_key_value_heads=4, vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def t5():
    config = T5Config(
        d_model=1024, d_ff=4096, num_heads=16, num_layers=1, num_decoder_layers=34,
        decoder_start_token_id=0,
    )  # fmt: skip
    return AutoModelForSeq2SeqLM.from_config(config)


def logits(runner):
    return np.stack([runner.prefill(PROMPT), runner.decode(NEXT)])


def gap(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("make", [llama, t5])
def test_a_graph_above_two_gibibytes(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    expected = logits(runner_of(model))
    onnx.write(model, tmp_path / "onnx")
    largest = max(file.stat().st_size for file in (tmp_path / "onnx").iterdir())
    assert largest > 2**31
    del model
    assert gap(logits(onnx.open_runner(tmp_path / "onnx")), expected) < 1e-4
    openvino.write(onnx.graph_in(tmp_path / "onnx"), tmp_path / "openvino")
    assert gap(logits(openvino.open_runner(tmp_path / "openvino")), expected) < 1e-4
    for kind in (onnx, openvino):
        name = kind.__name__.rpartition(".")[2]
        graph, place = kind.graph_in(tmp_path / name), tmp_path / f"{name}-int8"
        made = compression.compress(graph, place, "int8", [])
        assert made.bytes < 0.3 * made.bytes_before
        found = logits(kind.open_runner(place))
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99
