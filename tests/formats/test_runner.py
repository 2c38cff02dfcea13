"""Token by token a model says what it says of the whole text at once."""

from __future__ import annotations

import pytest
import torch

from elastic.errors import ExportError
from elastic.formats import onnx
from elastic.formats.runner import runner_of
from elastic.models.kinds import Kind, no_graph
from tests.helpers import tiny
from tests.helpers.clock import drive
from tests.zoo.building import config_of, model_of


@pytest.mark.parametrize("family", ["openai-gpt", "megatron-bert", "mamba"])
def test_step_by_step_is_all_at_once(family):
    """Of a model that caches nothing, one with room for an encoder's keys, one with a state."""
    model = model_of(config_of(family, "causal"), "causal", torch.float64)
    ids = tiny.tokens()
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, 3:]
    found = torch.from_numpy(drive(runner_of(model), ids.numpy(), 4))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family, what", [("openai-gpt", "caches nothing"),
                                          ("mamba", "LinearAttentionLayer"),
                                          ("falcon_h1", "LinearAttentionAndFull")])  # fmt: skip
def test_what_a_graph_cannot_go_on_from_is_refused_before_it_is_traced(family, what, tmp_path):
    model = model_of(config_of(family, "causal"), "causal", torch.float32)
    with pytest.raises(ExportError, match=what):
        onnx.write(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["big_bird", "longformer"])
def test_attention_in_pieces_is_no_graph(family):
    """Both would compute something else of long texts."""
    config = config_of(family, "classification")
    assert "cuts the text into pieces" in no_graph(Kind.CLASSIFIER, config)
    config.attention_type = "original_full"
    assert (no_graph(Kind.CLASSIFIER, config) is None) is (family == "big_bird")


@pytest.mark.parametrize("family", ["roberta", "megatron-bert", "apertus", "diffllama"])
def test_families_with_a_way_of_their_own_are_written_as_graphs(family, tmp_path):
    """RoBERTa's positions begin behind its padding's, the graph's at 0; Megatron's cache has room
    for an encoder's; the exporter does not know operations of the others."""
    model = model_of(config_of(family, "causal"), "causal", torch.float32)
    ids = tiny.tokens().numpy()
    expected = torch.from_numpy(drive(runner_of(model), ids, 4))
    found = torch.from_numpy(drive(onnx.OnnxRunner(onnx.write(model, tmp_path)), ids, 4))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
