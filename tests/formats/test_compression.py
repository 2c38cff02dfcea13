"""A compressed graph computes with the rounded weights that it says it has, and has them all."""

from __future__ import annotations

import functools
import shutil
import sys

import numpy as np
import onnx as onnx_library
import openvino as openvino_library
import pytest
import torch
from onnx import numpy_helper

from elastic.data.task import Example
from elastic.errors import ConfigError, MissingExtra
from elastic.formats import compression, onnx, onnx_compressed, tracing
from elastic.formats.compression import MODES, calibration_inputs, check, compress
from elastic.formats.rounding import Grid, rounded, saved_bytes
from elastic.formats.runner import runner_of
from tests.helpers import tiny
from tests.helpers.families import model_of
from tests.helpers.graphs import (
    PAIRS,
    ROUNDED_TOLERANCE,
    UNIFORM,
    Written,
    graph_runner,
    layers,
    sliced_llama,
    stored_bytes,
    tokens,
)

KINDS = ["onnx", "openvino"]
EXAMPLES = [Example(f"{a} + {b} =", str(a + b)) for a in range(4) for b in range(2)]


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """Two layers of widths 96 and 48, the second no multiple of the smallest group."""
    return Written(sliced_llama(tied=True), tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """Queries, keys and values have biases; the head is its own."""
    return Written(model_of("qwen2", torch.float32), tmp_path_factory.mktemp("biased"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return Written(model_of("bert, classes", torch.float32), tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def samples():
    return calibration_inputs(tiny.tokenizer(), sliced_llama(tied=True), EXAMPLES)


@pytest.fixture(scope="module")
def small(tied, samples, tmp_path_factory):
    """`tied` of a kind in a mode, compressed once for all who look at it."""

    @functools.cache
    def compressed(kind: str, mode: str) -> compression.Compressed:
        return compress(tied.paths[kind], tmp_path_factory.mktemp(mode), mode, samples)

    return compressed


@torch.no_grad()
def simulated(written: Written, found: compression.Compressed):
    """The logits of torch with the weights rounded as `found` says."""
    model = written.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    half = found.path.suffix == ".xml"
    for name, weight in found.weights.items():
        # What falls back from 4 bits gets 8 with a zero point, whatever the mode.
        sym = found.mode.endswith("_sym") and weight.bits == MODES[found.mode].bits
        tensor = model.get_submodule(name).weight
        tensor.copy_(rounded(tensor, Grid(weight.bits, weight.group, sym), half=half))
    logits = written.logits(runner_of(model))
    model.load_state_dict(before)
    return logits


@pytest.mark.parametrize(
    ("fixture", "kind", "mode"),
    [("tied", *pair) for pair in UNIFORM]
    + [(name, *pair) for name in ("biased", "classifier")
       for pair in UNIFORM if not pair[1].endswith("_sym")],
)  # fmt: skip
def test_it_computes_with_the_weights_it_says_it_has(
    fixture, kind, mode, request, tmp_path, monkeypatch
):
    """Prefill and decode, three rows; every linear layer and embedding is compressed."""
    monkeypatch.setattr(onnx_compressed, "ACCURACY_LEVEL", 0)
    written = request.getfixturevalue(fixture)
    found = compress(written.paths[kind], tmp_path, mode)
    assert set(found.weights) == layers(written.model)
    assert max(weight.bits for weight in found.weights.values()) == 8
    expected = simulated(written, found)
    logits = written.logits(graph_runner(found.path, exact=True))
    np.testing.assert_allclose(
        logits, expected, rtol=0, atol=ROUNDED_TOLERANCE * abs(expected).max()
    )
    assert abs(expected - written.logits(runner_of(written.model))).max() > 1e-2


@pytest.mark.parametrize(("kind", "mode"), PAIRS)
def test_every_mode_stays_near_the_float_model(tied, small, kind, mode):
    """As it is deployed, activations rounded too. Random weights of two layers are the worst case
    for 4 bits: nothing about them is redundant."""
    found = small(kind, mode)
    expected = tied.logits(runner_of(tied.model))
    logits = tied.logits(graph_runner(found.path))
    correlation = np.corrcoef(logits.ravel(), expected.ravel())[0, 1]
    assert correlation > (0.998 if MODES[mode].bits == 8 else 0.88)
    assert correlation < 0.99999


@pytest.mark.parametrize("kind", KINDS)
def test_groups_fit_the_width_and_what_has_none_gets_eight_bits(small, kind):
    found = small(kind, "int4")
    down = "model.layers.{}.mlp.down_proj"
    groups = {name: weight.group for name, weight in found.weights.items() if weight.bits == 4}
    assert groups.pop(down.format(0)) == 32
    assert groups.pop("model.layers.1.self_attn.o_proj") == 32
    assert len(groups) == 11 and set(groups.values()) == {64}
    assert found.exceptions == {
        "model.embed_tokens": "an embedding or the head",
        down.format(1): "no group of 32 or more divides its 48 channels",
    }
    assert found.weights[down.format(1)].shape == (64, 48)
    report = found.as_dict()
    assert report["layers"] == {"int8": 2, "int4, groups of 64": 11, "int4, groups of 32": 2}
    assert report["exceptions"][down.format(1)]["precision"] == "int8"


@pytest.mark.parametrize(("kind", "mode"), UNIFORM)
def test_the_size_is_that_of_codes_and_scales(tied, small, kind, mode):
    found = small(kind, mode)
    expected = floats = 0
    for weight in found.weights.values():
        rows, columns = weight.shape
        # OpenVINO: scales in float16, zero points in as many bits as the codes. ONNX Runtime's
        # kernel wants a float32 scale per block, and 8-bit zero points even where they are equal.
        block = weight.group or (columns if kind == "openvino" else max(columns & -columns, 32))
        scales, wide = rows * -(-columns // block), weight.bits == 8
        has_zero = not (mode.endswith("_sym") and weight.bits == MODES[mode].bits)
        zero = has_zero or (wide and kind == "onnx")
        expected += weight.bits * rows * -(-columns // block) * block / 8
        expected += scales * ((2 if kind == "openvino" else 4) + zero * weight.bits / 8)
        floats += 4 * rows * columns
    before, after = (stored_bytes(path) for path in (tied.paths[kind], found.path))
    assert after - (before - floats) == pytest.approx(expected, rel=0.02)
    assert saved_bytes(tied.model, mode) == pytest.approx(floats - expected, rel=0.04)
    assert found.bytes < found.bytes_before


def test_openvino_stays_stateful(small):
    model = openvino_library.Core().read_model(small("openvino", "int8").path)
    assert len(model.get_variables()) == 4
    names = {port.any_name for port in model.inputs}
    assert names == {"input_ids", "attention_mask", "position_ids", "beam_idx"}


def test_onnx_products_run_on_codes(small):
    """None is dequantised whole, and what remains of MatMul has no weight: attention and rotary
    angles."""
    graph = onnx_library.load(small("onnx", "int4").path)
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("MatMulNBits") == 15 and "DequantizeLinear" not in kinds
    constant = {tensor.name for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        assert node.op_type != "MatMul" or constant.isdisjoint(node.input)
    assert {item.domain for item in graph.opset_import} == {"", "com.microsoft"}


def test_scale_estimation_uses_the_examples(tied, small, samples, tmp_path):
    """Nearer on what it was shown than rounding to the nearest; shown something else, different."""
    graph = tied.paths["openvino"]
    written = {
        "nearest": small("openvino", "int4"),
        "shown": small("openvino", "int4_scale"),
        "other": compress(graph, tmp_path / "other", "int4_scale", samples[:1]),
    }
    assert written["other"].path == tmp_path / "other" / graph.name
    exact, errors = runner_of(tied.model), {}
    for name, found in written.items():
        runner = graph_runner(found.path, exact=True)
        errors[name] = np.mean([
            abs(runner.prefill(each["input_ids"]) - exact.prefill(each["input_ids"])).mean()
            for each in samples
        ])  # fmt: skip
    assert errors["shown"] < errors["nearest"]
    assert errors["shown"] != errors["other"]


@pytest.mark.parametrize("kind", KINDS)
def test_classifiers_are_calibrated_with_their_texts(classifier, kind, tmp_path):
    classifier.model.config.id2label = {0: "no", 1: "yes", 2: "perhaps"}
    examples = [Example("a b", "no", second="c"), Example("b", "yes", second="a a")]
    inputs = calibration_inputs(tiny.tokenizer(), classifier.model, examples)
    assert set(inputs[0]) == {"input_ids", "attention_mask", "token_type_ids"}
    assert inputs[0]["token_type_ids"].tolist() == [[0] * 5 + [1]]
    found = compress(classifier.paths[kind], tmp_path, "int4_scale", inputs)
    logits = classifier.logits(graph_runner(found.path))
    expected = classifier.logits(runner_of(classifier.model))
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.9


def test_examples_are_prompt_and_answer(samples):
    ids = tiny.tokenizer()("1 + 1 = 2")["input_ids"]
    assert samples[3]["input_ids"].tolist() == [ids]
    assert samples[3]["attention_mask"].tolist() == [[1] * len(ids)]


@pytest.mark.parametrize("kind", KINDS)
def test_it_may_take_the_place_of_what_it_read(tied, kind, tmp_path):
    for file in tied.paths[kind].parent.iterdir():
        shutil.copy(file, tmp_path)
    graph = tmp_path / tied.paths[kind].name
    names = sorted(file.name for file in tmp_path.iterdir())
    found = compress(graph, tmp_path, "int8")
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert found.path == graph and found.bytes < found.bytes_before
    expected = tied.logits(runner_of(tied.model))
    logits = tied.logits(graph_runner(graph))
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.998


@pytest.mark.parametrize("mode", ["int8", "int4_scale"])
def test_large_graphs_keep_their_weights_beside_them(
    tied, small, samples, mode, tmp_path, monkeypatch
):
    """Read and written: the same codes as from a graph in one file."""
    whole = small("onnx", mode)
    monkeypatch.setattr(tracing, "SINGLE_FILE_BYTES", 0)
    large = tmp_path / "large"
    model = onnx_library.load(tied.paths["onnx"])
    large.mkdir()
    onnx_library.save(
        model, large / "model.onnx", save_as_external_data=True, location="model.onnx.data"
    )
    found = compress(large / "model.onnx", tmp_path / "before", mode, samples)
    (tmp_path / "before").rename(tmp_path / "after")
    files = {file.name for file in (tmp_path / "after").iterdir()}
    assert files == {"model.onnx", "model.onnx.data"} and found.weights == whole.weights
    logits = tied.logits(graph_runner(tmp_path / "after" / "model.onnx"))
    np.testing.assert_array_equal(logits, tied.logits(graph_runner(whole.path)))


def test_nothing_is_printed(tied, tmp_path, capfd):
    compress(tied.paths["openvino"], tmp_path, "int4")
    assert capfd.readouterr() == ("", "")


def test_a_tied_head_of_odd_width_beside_a_constant_that_is_cast(tmp_path, monkeypatch):
    """40 channels fill two blocks of 32 in part; Gemma's graphs scale by a constant with a type of
    its own."""
    monkeypatch.setattr(onnx_compressed, "ACCURACY_LEVEL", 0)
    helper, types = onnx_library.helper, onnx_library.TensorProto
    weight = np.random.default_rng(0).normal(size=(16, 40)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["model.embed.weight", "input_ids"], ["rows"], name="embed"),
        helper.make_node("Cast", ["half"], ["factor"], name="cast", to=types.FLOAT),
        helper.make_node("Mul", ["rows", "factor"], ["x"], name="scaled"),
        helper.make_node("Transpose", ["model.embed.weight"], ["turned"], name="turn", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["logits"], name="head"),
    ]
    graph = helper.make_graph(
        nodes, "tied",
        [helper.make_tensor_value_info("input_ids", types.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", types.FLOAT, ["batch", "sequence", 16])],
        [numpy_helper.from_array(weight, "model.embed.weight"),
         numpy_helper.from_array(np.float16(0.5), "half")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx_library.save(model, tmp_path / "model.onnx")
    found = compress(tmp_path / "model.onnx", tmp_path / "small", "int8")
    assert {name: each.shape for name, each in found.weights.items()} == {"embed": (16, 40)}
    near = rounded(torch.tensor(weight), Grid(8))
    ids = tokens(2, 5) % 16
    expected = (near[torch.tensor(ids)][:, -1] / 2) @ near.T
    logits = onnx.OnnxRunner(found.path, threads=1).prefill(ids)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("graph", "mode", "group", "message"),
    [
        ("a.onnx", "int4_akw", 64, "unknown compression 'int4_akw'; did you mean 'int4_awq'"),
        ("a.onnx", "nf4", 64, "NNCF has it for openvino alone, not for onnx; there: int8, "),
        ("a.xml", "int4_awq", 64, "'int4_awq' looks at activations and got no examples"),
        ("a.xml", "int4", 48, "group 48 is no power of two from 32"),
        ("a.bin", "int4", 64, r"wanted a file that ends in \.onnx or \.xml"),
    ],
)
def test_refused_before_anything_is_read(graph, mode, group, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        compress(tmp_path / graph, tmp_path / "out", mode, group=group)
    assert not list(tmp_path.iterdir())


def test_without_nncf_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingExtra, match=r"elastic-adapters\[compress\]"):
        check("int8", "onnx")


def test_examples_may_come_later():
    assert check("int4_awq", "onnx").calibrated
