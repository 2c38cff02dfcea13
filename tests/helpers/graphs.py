"""Small models as graphs, and how each runtime is driven."""

from __future__ import annotations

import numpy as np
import onnx as onnx_library
import openvino as openvino_library
import torch
from onnx import numpy_helper
from transformers import LlamaConfig, LlamaForCausalLM

from elastic.formats import onnx, openvino
from elastic.formats.compression import MODES
from elastic.formats.runner import TorchRunner
from tests.helpers import tiny
from tests.helpers.clock import drive

VOCAB, HEAD_DIM = 128, 16


def sliced_llama(*, tied: bool, vocab: int = VOCAB) -> LlamaForCausalLM:
    """Two layers unlike each other: MLP widths 96 and 48, KV heads 2 and 1, query heads 4 and 2."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # with the usual 0.02 attention hardly moves the logits
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    shapes = {
        (attention, "q_proj"): (64, 2 * HEAD_DIM),
        (attention, "k_proj"): (64, HEAD_DIM),
        (attention, "v_proj"): (64, HEAD_DIM),
        (attention, "o_proj"): (2 * HEAD_DIM, 64),
        (mlp, "gate_proj"): (64, 48),
        (mlp, "up_proj"): (64, 48),
        (mlp, "down_proj"): (48, 64),
    }
    for (owner, name), (inputs, outputs) in shapes.items():
        linear = torch.nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        torch.nn.init.normal_(linear.weight, std=0.3)
        setattr(owner, name, linear)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length))


def run(runner, prompt: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The runner's logits for `follow`'s arguments."""
    first = runner.prefill(prompt)
    return np.stack([first, *(runner.decode(steps[:, [i]]) for i in range(steps.shape[1]))])


PAIRS = [(kind, mode) for mode, each in MODES.items() for kind in each.formats]
UNIFORM = [pair for pair in PAIRS if pair[1] in ("int8", "int8_sym", "int4", "int4_sym")]
ROUNDED_TOLERANCE = 3e-4
"""Of the largest logit: float32 sums in another order."""
PROMPT, STEPS = tokens(3, 5) % tiny.VOCABULARY, tokens(3, 3, seed=1) % tiny.VOCABULARY


class Written:
    """A model and its graphs."""

    def __init__(self, model, folder):
        self.model = model
        self.paths = {"onnx": onnx.write(model, folder)}
        self.paths["openvino"] = openvino.write(self.paths["onnx"], folder)
        self.steps = STEPS[:, :0] if hasattr(model, "num_labels") else STEPS

    def logits(self, runner) -> np.ndarray:
        return run(runner, PROMPT, self.steps)


def graph_runner(path, *, exact: bool = False):
    """Exact: activations stay in float32, which the kernels of OpenVINO need to be told."""
    if path.suffix == ".onnx":
        return onnx.OnnxRunner(path, threads=1)
    runner = openvino.OpenVINORunner(path, threads=1)
    if exact:
        options = dict.fromkeys(("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION"), "f32")
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
        compiled = openvino_library.Core().compile_model(path, "CPU", options)
        runner._request = compiled.create_infer_request()
    return runner


def layers(model) -> set[str]:
    """Names of everything with a weight to compress, tied ones once."""
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    found = {module.weight: name for name, module in reversed(list(model.named_modules()))
             if isinstance(module, kinds)}  # fmt: skip
    return set(found.values())


def stored_bytes(path) -> int:
    """Of all constants, without the graph."""
    if path.suffix == ".xml":
        return path.with_suffix(".bin").stat().st_size
    tensors = onnx_library.load(path).graph.initializer
    return sum(numpy_helper.to_array(tensor).nbytes for tensor in tensors)


def same_in_every_runtime(small, folder) -> None:
    ids = tiny.tokens(2, 9).numpy()
    expected = drive(TorchRunner(small), ids, 5)
    graph = onnx.write(small, folder)
    for runner in (
        onnx.OnnxRunner(graph),
        openvino.OpenVINORunner(openvino.write(graph, folder)),
    ):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(drive(runner, ids, 5), expected, rtol=0, atol=1e-4 * scale)
