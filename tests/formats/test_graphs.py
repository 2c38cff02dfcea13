"""A written model computes what torch computes: at any prompt length, batch, and along decode."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elastic.errors import ConfigError
from elastic.formats import onnx, onnx_session, openvino, tracing
from tests.helpers import tiny
from tests.helpers.graphs import VOCAB, run, sliced_llama, tokens
from tests.zoo.building import config_of, model_of

onnxruntime = pytest.importorskip("onnxruntime")


pytest.importorskip("onnx")


RUNTIMES = ["onnx", "openvino"]
TOLERANCE = 2e-4
"""Of the largest logit: float32 sums in another order, over two layers and five steps."""


def follow(model, prompt: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Torch's logits (1 + steps, batch, vocab) after the prompt and after each further token.

    Computed from the whole sequence at once, so no cache can be wrong on both sides.
    """
    whole = torch.from_numpy(np.concatenate([prompt, steps], axis=1))
    logits = model(input_ids=whole, use_cache=False).logits
    return logits[:, prompt.shape[1] - 1 :].transpose(0, 1).numpy()


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * abs(expected).max())


@pytest.fixture(scope="module")
def model():
    return sliced_llama(tied=True)


@pytest.fixture(scope="module")
def onnx_path(model, tmp_path_factory):
    return onnx.write(model, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def openvino_path(onnx_path, tmp_path_factory):
    pytest.importorskip("openvino")
    return openvino.write(onnx_path, tmp_path_factory.mktemp("openvino"))


@pytest.fixture(scope="module", params=RUNTIMES)
def runner(request):
    path = request.getfixturevalue(f"{request.param}_path")
    kinds = {"onnx": onnx.OnnxRunner, "openvino": openvino.OpenVINORunner}
    return kinds[request.param](path, threads=1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_prefill_and_decode_equal_torch(model, runner, batch, length):
    prompt, steps = tokens(batch, length), tokens(batch, 4, seed=1)
    assert_close(run(runner, prompt, steps), follow(model, prompt, steps))


def test_greedy_tokens_equal_torch(model, runner):
    prompt = whole = tokens(3, 5)
    logits = runner.prefill(prompt)
    for _ in range(8):
        token = logits.argmax(-1, keepdims=True)
        expected = model(input_ids=torch.from_numpy(whole), use_cache=False).logits[:, -1].numpy()
        np.testing.assert_array_equal(token[:, 0], expected.argmax(-1))
        whole, logits = np.concatenate([whole, token], axis=1), runner.decode(token)


def test_prefill_forgets_what_came_before(runner):
    prompt, steps = tokens(1, 4), tokens(1, 2, seed=1)
    first = run(runner, prompt, steps)
    run(runner, tokens(3, 6, seed=2), tokens(3, 2, seed=3))
    np.testing.assert_array_equal(run(runner, prompt, steps), first)


def test_logits_outlive_the_next_step(runner):
    first = runner.prefill(tokens(1, 4))
    kept = first.copy()
    runner.decode(tokens(1, 1, seed=1))
    np.testing.assert_array_equal(first, kept)


def session_logits(path, input_ids, attention_mask, position_ids) -> np.ndarray:
    """Logits of one prefill, (batch, sequence or 1, vocab), every input given by hand."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
    for item in session.get_inputs()[3:]:
        _, heads, _, head_dim = item.shape
        feeds[item.name] = np.zeros((len(input_ids), heads, 0, head_dim), np.float32)
    return session.run(["logits"], feeds)[0]


def test_left_padding_changes_nothing(model, onnx_path):
    long, short = tokens(1, 6), tokens(1, 4, seed=1)
    padded = np.concatenate([long, np.pad(short, ((0, 0), (2, 0)), constant_values=5)])
    mask = np.array([[1] * 6, [0] * 2 + [1] * 4])
    logits = session_logits(onnx_path, padded, mask, (mask.cumsum(1) - 1).clip(min=0))
    none = tokens(1, 0)
    for row, alone in zip(logits, (long, short), strict=True):
        assert_close(row, follow(model, alone, none)[0])


def test_all_logits_have_every_position(model, tmp_path):
    ids = tokens(3, 5)
    path = onnx.write(model, tmp_path, logits="all")
    logits = session_logits(path, ids, np.ones_like(ids), np.arange(5)[None].repeat(3, axis=0))
    assert logits.shape == (3, 5, VOCAB)
    assert_close(logits, model(input_ids=torch.from_numpy(ids)).logits.numpy())


def test_last_logits_are_one_position(onnx_path):
    ids = tokens(3, 5)
    logits = session_logits(onnx_path, ids, np.ones_like(ids), np.arange(5)[None].repeat(3, axis=0))
    assert logits.shape == (3, 1, VOCAB)


def test_beam_idx_selects_whose_past_continues(model, openvino_path):
    prompt, token, swapped = tokens(2, 4), tokens(2, 1, seed=1), np.array([1, 0], np.int32)
    import openvino as runtime

    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    request = runtime.Core().compile_model(openvino_path, "CPU", settings).create_infer_request()
    names = {port.any_name for port in request.model_inputs}
    assert names == {"input_ids", "attention_mask", "position_ids", "beam_idx"}
    straight = {"beam_idx": np.arange(2, dtype=np.int32)}
    request.infer({**onnx_session.step_inputs(prompt, 0, names), **straight})
    logits = request.infer({**onnx_session.step_inputs(token, 4, names), "beam_idx": swapped})[
        "logits"
    ]
    assert_close(logits[:, -1], follow(model, prompt[swapped], token)[1])


def test_tied_weights_are_stored_once(tmp_path):
    """A head of its own costs vocab · hidden · 4 bytes more, and nothing else does."""
    vocab = 4096
    sizes = {
        tied: onnx.write(sliced_llama(tied=tied, vocab=vocab), tmp_path / str(tied)).stat().st_size
        for tied in (True, False)
    }
    assert sizes[False] - sizes[True] == pytest.approx(vocab * 64 * 4, rel=0.01)


def test_untied_head_equals_torch(tmp_path):
    model = sliced_llama(tied=False)
    prompt, steps = tokens(2, 3), tokens(2, 2, seed=1)
    runner = onnx.OnnxRunner(onnx.write(model, tmp_path), threads=1)
    assert_close(run(runner, prompt, steps), follow(model, prompt, steps))


def test_external_weights_move_with_their_directory(model, onnx_path, tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "SINGLE_FILE_BYTES", 0)
    for _ in range(2):  # the second write replaces the first, it does not append
        onnx.write(model, tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    files = {file.name: file.stat().st_size for file in (tmp_path / "after").iterdir()}
    assert set(files) == {"model.onnx", "model.onnx.data"}
    assert sum(files.values()) == pytest.approx(onnx_path.stat().st_size, rel=0.1)
    runner = onnx.OnnxRunner(tmp_path / "after" / "model.onnx", threads=1)
    prompt, steps = tokens(1, 3), tokens(1, 2, seed=1)
    assert_close(run(runner, prompt, steps), follow(model, prompt, steps))


@pytest.mark.parametrize("training", [True, False])
def test_writing_leaves_the_model_as_it_was(tmp_path, training):
    model = sliced_llama(tied=True).train(training)
    model.set_attn_implementation("sdpa")
    onnx.write(model, tmp_path)
    assert {module.training for module in model.modules()} == {training}
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["cohere", "cohere2", "ernie4_5"])
def test_rotary_embeddings_that_repeat_their_frequencies(family, tmp_path):
    """torch's exporter spoils the constants that stand beside them, unless it gets its own."""
    model = model_of(config_of(family, "causal"), "causal", torch.float32)
    prompt, steps = tiny.tokens(2, 5).numpy(), tiny.tokens(2, 3, seed=1).numpy()
    assert_close(run(onnx.OnnxRunner(onnx.write(model, tmp_path)), prompt, steps),
                 follow(model, prompt, steps))  # fmt: skip


def test_refuses_what_it_cannot_write(model, tmp_path):
    with pytest.raises(ConfigError, match="unknown logits 'lst'; did you mean 'last'"):
        onnx.write(model, tmp_path, logits="lst")
    with pytest.raises(ConfigError, match=r"wanted a float32 model, got torch\.bfloat16"):
        onnx.write(sliced_llama(tied=True).bfloat16(), tmp_path)
    assert not list(tmp_path.iterdir())
