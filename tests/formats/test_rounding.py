"""What a graph will answer once it is compressed is known before there is one."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.formats import onnx_compressed
from elastic.formats.compression import compress
from elastic.formats.rounding import Grid, grids, round_, rounded
from elastic.formats.runner import runner_of
from tests.helpers.families import model_of
from tests.helpers.graphs import (
    ROUNDED_TOLERANCE,
    UNIFORM,
    Written,
    graph_runner,
    layers,
    sliced_llama,
)

MODELS = {
    "llama, sliced": lambda: sliced_llama(tied=True),
    "gemma2": lambda: model_of("gemma2", torch.float32),
    "opt": lambda: model_of("opt", torch.float32),
    "bert, classes": lambda: model_of("bert, classes", torch.float32),
}
"""Tied and not, a row of zeros in the embedding, several embeddings, a head that is not the
vocabulary's."""


@pytest.fixture(scope="module", params=MODELS)
def written(request, tmp_path_factory):
    return Written(MODELS[request.param](), tmp_path_factory.mktemp("graphs"))


@pytest.mark.parametrize(("kind", "mode"), [pair for pair in UNIFORM if pair[1] != "int8_sym"])
def test_it_answers_as_the_compressed_graph_does(written, kind, mode, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_compressed, "ACCURACY_LEVEL", 0)
    found = compress(written.paths[kind], tmp_path, mode)
    stored = {name: (weight.bits, weight.group) for name, weight in found.weights.items()}
    expected = grids(written.model, mode)
    assert stored == {name: (grid.bits, grid.group) for name, grid in expected.items()}
    near = round_(copy.deepcopy(written.model), mode, kind)
    logits = written.logits(graph_runner(found.path, exact=True))
    tolerance = ROUNDED_TOLERANCE * abs(logits).max()
    np.testing.assert_allclose(written.logits(runner_of(near)), logits, rtol=0, atol=tolerance)
    assert abs(written.logits(runner_of(written.model)) - logits).max() > 10 * tolerance


def test_what_shared_its_weights_keeps_them():
    model = sliced_llama(tied=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    memo = {id(parameter): parameter for parameter in model.parameters()}
    near = round_(copy.deepcopy(model, memo), "int8", "onnx")
    assert near.lm_head.weight is near.get_input_embeddings().weight
    for name, tensor in near.state_dict().items():
        assert torch.equal(model.state_dict()[name], before[name])
        assert torch.equal(tensor, before[name]) == ("norm" in name), name
    assert set(grids(model, "int4")) == layers(model)


WEIGHTS = st.lists(st.floats(-8, 8, width=32), min_size=64, max_size=64)


@given(WEIGHTS, st.sampled_from([4, 8]), st.sampled_from([None, 32]), st.booleans())
def test_a_code_is_at_most_half_a_step_away(values, bits, group, symmetric):
    weight = torch.tensor(values).reshape(1, 64)
    near = rounded(weight, Grid(bits, group, symmetric))
    assert torch.isfinite(near).all()
    for part, own in zip(
        near.reshape(-1, group or 64), weight.reshape(-1, group or 64), strict=True
    ):
        low, high = min(0.0, own.min().item()), max(0.0, own.max().item())
        step = 2 * max(-low, high) / 2**bits if symmetric else (high - low) / (2**bits - 1)
        # A whole one at the far end of a symmetric grid, which has one code less there.
        assert (part - own).abs().max().item() <= (1.0 if symmetric else 0.5001) * step + 1e-6
        assert len(part.unique()) <= 2**bits
