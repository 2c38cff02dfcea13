"""The shipped Bloom space on a small random Bloom: what was tested of it is here."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from elastic.config import StageConfig
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact, sliced
from elastic.supernet.cost import Counter, count
from elastic.supernet.store import load_run
from elastic.supernet.supernet import Supernet
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.families import bloom, save_bloom
from tests.helpers.laws import close, several
from tests.helpers.tiny_runs import train_config


def net_of(method: str = "lora", dtype: torch.dtype = torch.float64) -> Supernet:
    net = Supernet(bloom(dtype), SearchSpace.load("bloom"), tiny.ADAPTERS[method])
    net.reorder(tiny.permutations(net))
    return tiny.randomize_(net)


def logits(model: nn.Module, padding: int = 0) -> torch.Tensor:
    """Of the real positions of two sequences, the second padded on the left."""
    ids = tiny.tokens()
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]


def test_on_bloomz_7b_it_has_the_widths_of_lonas():
    with torch.device("meta"):
        model = BloomForCausalLM(BloomConfig(hidden_size=4096, n_layer=30, n_head=32))
    bound = SearchSpace.load("bloom").bind(model, 32)
    groups = {group.name: group for group in bound}
    assert len(groups) == 90
    layer = "transformer.h.29"
    assert groups[f"{layer}.attention_rank"].choices == (32, 16, 8)
    assert groups[f"{layer}.mlp_rank"].choices == (32, 16, 8)
    width = groups[f"{layer}.mlp_width"]
    assert width.choices == (16384, 14336, 12288, 10240, 8192)
    assert [(cut.site, cut.axis) for cut in width.cuts] == [
        (f"{layer}.mlp.dense_h_to_4h", "out"),
        (f"{layer}.mlp.dense_4h_to_h", "in"),
    ]
    assert set(bound.targets) == {
        f"transformer.h.{i}.{name}"
        for i in range(30)
        for name in ("self_attention.query_key_value", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    }


# Bloom rounds its attention to float32 whatever the type, so merging shows that rounding; and in
# float64 its mask overflows there, so only float32 can be padded.
@pytest.mark.parametrize(
    ("dtype", "padding", "relative"),
    [(torch.float64, 0, 1e-6), (torch.float32, 3, 1e-4)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("method", ["lora", "sorsa", "olora"])
def test_active_sliced_and_merged_are_one_function(method, dtype, padding, relative):
    net = net_of(method, dtype)
    full = logits(net.model, padding)
    for sub in several(net):
        with net.active(sub):
            expected = logits(net.model, padding)
        close(logits(sliced(net, sub), padding), expected, 1e-12 if padding == 0 else 1e-5)
        merged = compact(net, sub)
        close(logits(merged, padding), expected, relative)
        assert Counter(net.model, net.space)(sub) == count(merged)
        if sub != net.space.maximal():
            assert (expected - full).abs().max() > 1e-3 * full.abs().max()


def test_the_order_of_channels_leaves_the_base_model_as_it_is():
    expected = logits(bloom())
    net = Supernet(bloom(), SearchSpace.load("bloom"), tiny.ADAPTERS["lora"])
    net.reorder(tiny.permutations(net))
    close(logits(net.model), expected, 1e-6)
    assert any(torch.any(order != torch.arange(len(order))) for order in net.order.values())


def test_it_trains_from_the_command(tmp_path):
    stages = [StageConfig(), StageConfig(train_dims=["rank", "width"])]
    config = train_config(save_bloom(tmp_path / "base"), tmp_path / "run", space="bloom",
                          stages=stages)  # fmt: skip
    net = load_run(train_one(config))[2]
    moved = [adapter.factors(tiny.RANK)[1].abs().max() > 0 for _, adapter in net.adapters()]
    assert len(moved) == 2 * 3 and all(moved)
