"""An encoder-decoder model that was cut computes in every runtime what torch computes."""

from __future__ import annotations

import copy
import random

import numpy as np
import onnx as format_of
import onnxruntime
import openvino as runtime
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from elastic.errors import ConfigError
from elastic.formats import onnx, onnx_compressed, onnx_seq2seq, openvino, tracing
from elastic.formats.compression import ENCODERS, compress
from elastic.formats.rounding import grids, round_
from elastic.formats.runner import runner_of
from elastic.supernet.compact import compact
from tests.helpers import tiny
from tests.helpers.graphs import ROUNDED_TOLERANCE, stored_bytes
from tests.helpers.seq2seq import drive, net_of

RUNTIMES = {"onnx": onnx, "openvino": openvino}
TOLERANCE = 2e-4
"""Of the largest logit: float32 sums in another order, over four layers and six steps."""


@pytest.fixture(scope="module")
def model():
    """MLPs of several widths, in the encoder as in the decoder."""
    net = net_of()
    for number in range(100):
        sub = net.space.random(random.Random(number))
        chosen = sub.as_dict()
        widths = [{v for k, v in chosen.items() if k.startswith(side) and k.endswith("width")}
                  for side in ("encoder", "decoder")]  # fmt: skip
        if all(len(found) > 1 for found in widths):
            return compact(net, sub).float()
    raise AssertionError("no such sub-adapter")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    openvino.write(onnx.write(model, folder), folder)
    return folder


@pytest.fixture(scope="module", params=RUNTIMES)
def runner(request, folder):
    return RUNTIMES[request.param].open_runner(folder, threads=1)


def expected(model, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Torch's logits for `drive`'s arguments, of the whole answer at once, without any cache."""
    start = np.full((len(target), 1), model.config.decoder_start_token_id)
    answer = torch.from_numpy(np.concatenate([start, target], axis=1))
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(source), decoder_input_ids=answer, use_cache=False
        )
    return output.logits.transpose(0, 1).numpy()


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * abs(wanted).max())


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return tiny.tokens(batch, length, seed).numpy()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_every_step_equals_torch(model, runner, batch, length):
    source, target = tokens(batch, length), tokens(batch, 5, seed=1)
    close(drive(runner, source, target), expected(model, source, target))


def test_a_prompt_padded_in_a_batch_gives_what_it_gives_alone(model, runner):
    long, short, target = tokens(1, 9), tokens(1, 4, seed=1), tokens(2, 3, seed=2)
    batch = np.concatenate([long, np.pad(short, ((0, 0), (0, 5)), constant_values=5)])
    mask = np.array([[1] * 9, [1] * 4 + [0] * 5])
    steps = [runner.prefill(batch, mask)]
    steps += [runner.decode(target[:, [i]]) for i in range(target.shape[1])]
    for row, alone in enumerate((long, short)):
        close(np.stack(steps)[:, row], expected(model, alone, target[[row]])[:, 0])


def test_prefill_forgets_what_came_before(runner):
    first = drive(runner, tokens(1, 4), tokens(1, 2, seed=1)).copy()
    drive(runner, tokens(3, 6, seed=2), tokens(3, 2, seed=3))
    np.testing.assert_array_equal(drive(runner, tokens(1, 4), tokens(1, 2, seed=1)), first)


def test_the_decoder_is_called_as_optimum_calls_it(model, folder):
    """A first past of length 1, of zeros, which must not count; then cross-attention's own, of
    which the branch with a cache says nothing."""
    source, target = tokens(2, 6), tokens(2, 1, seed=1)
    providers = ["CPUExecutionProvider"]
    encoder = onnxruntime.InferenceSession(folder / "encoder_model.onnx", providers=providers)
    decoder = onnxruntime.InferenceSession(
        folder / "decoder_model_merged.onnx", providers=providers
    )
    mask = np.ones_like(source)
    (hidden,) = encoder.run(None, {"input_ids": source, "attention_mask": mask})
    heads, size = model.config.num_heads, model.config.d_kv
    past = {f"past_key_values.{layer}.{kind}.{leaf}": np.zeros((2, heads, 1, size), np.float32)
            for layer in range(2) for kind in ("decoder", "encoder")
            for leaf in ("key", "value")}  # fmt: skip
    given = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
    start = np.full((2, 1), model.config.decoder_start_token_id)
    names = [item.name for item in decoder.get_outputs()]
    said = []
    for ids, cached in ((start, False), (target, True)):
        feeds = {"input_ids": ids, "use_cache_branch": np.array([cached]), **given, **past}
        found = dict(zip(names, decoder.run(None, feeds), strict=True))
        said.append(found.pop("logits")[:, -1])
        for name, value in found.items():
            if cached and ".encoder." in name:
                assert value.size == 0
            else:
                past[name.replace("present", "past_key_values")] = value
    close(np.stack(said), expected(model, source, target))


def test_names_and_inputs_are_those_of_optimum_intel(folder):
    core = runtime.Core()
    encoder = core.read_model(folder / "openvino_encoder_model.xml")
    decoder = core.read_model(folder / "openvino_decoder_model.xml")
    assert {port.any_name for port in encoder.inputs} == {"input_ids", "attention_mask"}
    assert {port.any_name for port in encoder.outputs} == {"last_hidden_state"}
    assert {port.any_name for port in decoder.outputs} == {"logits"}
    assert {port.any_name for port in decoder.inputs} == {
        "input_ids", "encoder_hidden_states", "encoder_attention_mask", "beam_idx",
    }  # fmt: skip


def test_cross_attention_is_computed_once(model, folder):
    """Whatever is said of the prompt later changes nothing but its length."""
    runner = openvino.open_runner(folder, threads=1)
    source, target = tokens(1, 6), tokens(1, 1, seed=1)
    runner.prefill(source)
    runner._given["encoder_hidden_states"] = np.zeros_like(runner._given["encoder_hidden_states"])
    close(runner.decode(target), expected(model, source, target)[1])


def test_answers_of_one_prompt_continue_each_other(model, folder):
    runner = openvino.open_runner(folder, threads=1)
    source, first, then = tokens(1, 6).repeat(2, 0), tokens(2, 1, seed=1), tokens(2, 1, seed=2)
    runner.prefill(source)
    runner.decode(first)
    runner._given["beam_idx"] = np.array([1, 0], np.int32)
    answer = np.concatenate([first[[1, 0]], then], axis=1)
    close(runner.decode(then), expected(model, source, answer)[2])


def test_weights_are_stored_once_but_for_shared_embeddings(tmp_path):
    """Two branches read one set of them, and a head that is the embedding is none of its own."""
    model, vocabulary = tiny.t5(vocab_size=4096), 4096
    onnx.write(model, tmp_path)
    openvino.write(tmp_path / onnx_seq2seq.DECODER, tmp_path)
    sizes = {side: sum(4 * tensor.numel() for tensor in {*getattr(model, side).parameters()})
             for side in ("encoder", "decoder")}  # fmt: skip
    assert sizes["decoder"] > vocabulary * model.config.d_model * 4
    for side, file in (("encoder", onnx_seq2seq.ENCODER), ("decoder", onnx_seq2seq.DECODER)):
        graph = format_of.load(tmp_path / file).graph
        stored = sum(len(tensor.raw_data) for tensor in graph.initializer)
        assert stored == pytest.approx(sizes[side], rel=0.01)
        weights = tmp_path / f"openvino_{side}_model.bin"
        assert weights.stat().st_size == pytest.approx(sizes[side], rel=0.02)


def test_external_weights_move_with_their_directory(model, tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "SINGLE_FILE_BYTES", 0)
    (tmp_path / "before").mkdir()
    graph = onnx.write(model, tmp_path / "before")
    openvino.write(graph, tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    assert {file.name for file in (tmp_path / "after").iterdir()} == {
        *(f"{name}{end}" for name in (onnx_seq2seq.ENCODER, onnx_seq2seq.DECODER)
          for end in ("", ".data")),
        *(f"openvino_{side}_model.{end}" for side in ("encoder", "decoder")
          for end in ("xml", "bin")),
    }  # fmt: skip
    source, target = tokens(1, 3), tokens(1, 2, seed=1)
    for kind in RUNTIMES:
        found = drive(RUNTIMES[kind].open_runner(tmp_path / "after"), source, target)
        close(found, expected(model, source, target))


def test_another_family(tmp_path):
    """Positions that are learned, and layers of other names."""
    config = BartConfig(
        vocab_size=tiny.VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, max_position_embeddings=64, init_std=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config).eval().requires_grad_(False)
    openvino.write(onnx.write(model, tmp_path), tmp_path)
    source, target = tokens(2, 9), tokens(2, 4, seed=1)
    wanted = expected(model, source, target)
    close(drive(runner_of(model), source, target), wanted)
    for kind in RUNTIMES.values():
        close(drive(kind.open_runner(tmp_path), source, target), wanted)


@pytest.mark.parametrize("training", [True, False])
def test_writing_leaves_the_model_as_it_was(tmp_path, training):
    model = tiny.t5().train(training)
    model.set_attn_implementation("sdpa")
    onnx.write(model, tmp_path)
    assert {module.training for module in model.modules()} == {training}
    assert model.encoder.config._attn_implementation == "sdpa"
    assert model.decoder.config._attn_implementation == "sdpa"


SOURCE, TARGET = tiny.tokens(3, 5).numpy(), tiny.tokens(3, 4, seed=1).numpy()


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
@pytest.mark.parametrize("kind", RUNTIMES)
def test_it_answers_as_rounded(model, folder, exact, kind, mode, tmp_path):
    graph = RUNTIMES[kind].graph_in(folder)
    found = compress(graph, tmp_path, mode)
    assert {file.name for file in tmp_path.iterdir()} >= {graph.name, ENCODERS[graph.name]}
    stored = {name: (weight.bits, weight.group) for name, weight in found.weights.items()}
    # The encoder's file has the embedding, too.
    stored.pop("encoder.embed_tokens")
    expected = grids(model, mode)
    assert stored == {name: (grid.bits, grid.group) for name, grid in expected.items()}
    logits = drive(RUNTIMES[kind].open_runner(found.path, threads=1), SOURCE, TARGET)
    near = drive(runner_of(round_(copy.deepcopy(model), mode, kind)), SOURCE, TARGET)
    tolerance = ROUNDED_TOLERANCE * abs(near).max()
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
