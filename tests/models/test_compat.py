"""A cache reaches a model and comes back, whatever its class calls it."""

import pytest
import torch
from torch import nn

from elastic.formats.onnx_session import filled, flattened
from elastic.models import compat
from tests.helpers.families import model_of

IDS = torch.tensor([[5, 6, 7, 8, 9]])


class Former(nn.Module):
    """A class that keeps the name of before transformers 5.24."""

    def forward(self, input_ids, past_key_values=None):
        return {"past_key_values": past_key_values}


class Renamed(nn.Module):
    def forward(self, input_ids, cache=None):
        return {"cache": cache}


@pytest.mark.parametrize("kind, name", [(Former, "past_key_values"), (Renamed, "cache")])
def test_a_cache_is_given_by_the_name_that_the_class_knows(kind, name):
    assert kind()(IDS, **compat.given(kind(), "kept")) == {name: "kept"}


@pytest.mark.filterwarnings("error:.*past_key_values.*:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom"])
def test_reading_on_from_a_cache_is_reading_the_whole(family):
    model = model_of(family)
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
        first = model(input_ids=IDS[:, :3], use_cache=True)
        tensors = flattened(compat.cache_of(first))
        rest = model(input_ids=IDS[:, 3:], **compat.given(model, filled(tensors)))
    assert tensors[0].shape[2] == 3
    torch.testing.assert_close(rest.logits, whole[:, 3:], rtol=1e-5, atol=1e-5)


def test_a_model_that_cached_nothing_has_none():
    assert compat.cache_of(model_of("llama")(input_ids=IDS, use_cache=False)) is None
