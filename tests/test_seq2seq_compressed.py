"""Both graphs of an encoder-decoder model are compressed, and compute with the rounded weights."""

import copy

import numpy as np
import onnx as format_of
import openvino as runtime
import pytest

from elastic.errors import ConfigError
from elastic.formats import onnx, onnx_compressed, onnx_seq2seq, openvino
from elastic.formats.compression import ENCODERS, compress
from elastic.formats.rounding import grids, round_
from elastic.formats.runner import runner_of
from tests import tiny
from tests.test_compression import TOLERANCE, stored_bytes
from tests.test_encoder_decoder import drive

SOURCE, TARGET = tiny.tokens(3, 5).numpy(), tiny.tokens(3, 4, seed=1).numpy()
GRAPHS = {"onnx": onnx, "openvino": openvino}


@pytest.fixture
def exact(monkeypatch):
    """Activations stay in float32."""
    options = dict.fromkeys(("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION"), "f32")
    options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
    monkeypatch.setattr(
        openvino, "compiled_on_cpu",
        lambda path, *_: runtime.Core().compile_model(path, "CPU", options),
    )  # fmt: skip
    monkeypatch.setattr(onnx_compressed, "ACCURACY_LEVEL", 0)


@pytest.mark.parametrize("mode", ["int8", "int4", "int4_sym"])
@pytest.mark.parametrize("kind", GRAPHS)
def test_it_answers_as_rounded(model, folder, exact, kind, mode, tmp_path):
    graph = GRAPHS[kind].graph_in(folder)
    found = compress(graph, tmp_path, mode)
    assert {file.name for file in tmp_path.iterdir()} >= {graph.name, ENCODERS[graph.name]}
    stored = {name: (weight.bits, weight.group) for name, weight in found.weights.items()}
    # The encoder's file has the embedding, too.
    stored.pop("encoder.embed_tokens")
    expected = grids(model, mode)
    assert stored == {name: (grid.bits, grid.group) for name, grid in expected.items()}
    logits = drive(GRAPHS[kind].open_runner(found.path, threads=1), SOURCE, TARGET)
    near = drive(runner_of(round_(copy.deepcopy(model), mode, kind)), SOURCE, TARGET)
    tolerance = TOLERANCE * abs(near).max()
    np.testing.assert_allclose(logits, near, rtol=0, atol=tolerance)
    assert abs(logits - drive(runner_of(model), SOURCE, TARGET)).max() > 10 * tolerance


def test_weights_stay_shared_between_the_branches(folder, tmp_path):
    graph = folder / onnx_seq2seq.DECODER
    found = compress(graph, tmp_path, "int8")
    assert stored_bytes(found.path) < 0.3 * stored_bytes(graph)
    merged = format_of.load(found.path)
    branches = [item.g for node in merged.graph.node for item in node.attribute if item.g.node]
    assert len(branches) == 2 and not any(branch.initializer for branch in branches)
    read = [{name for node in branch.node for name in node.input} for branch in branches]
    assert any(name.endswith("_quantized") for name in read[0] & read[1])


def test_activations_of_a_pair_are_not_looked_at(folder, tmp_path):
    with pytest.raises(ConfigError, match="'int4_awq' looks at activations, which are"):
        compress(folder / onnx_seq2seq.DECODER, tmp_path, "int4_awq", [{"input_ids": SOURCE}])
    assert not list(tmp_path.iterdir())
