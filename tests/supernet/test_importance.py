"""Channel orders put first what contributes most."""

import pytest
import torch

from elastic.spaces.declared import SearchSpace
from elastic.spaces.dims import Cut, channel_index
from elastic.supernet.importance import channel_order
from tests.helpers import tiny
from tests.helpers.families import FAMILIES, model_of


def bound(model, heads=True):
    return tiny.space(heads=heads).bind(model, tiny.RANK)


def batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def mlp_inputs(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """What every down projection is fed, computed from its block's own parts."""
    states = model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    found = []
    for layer, x in zip(model.model.layers, states, strict=False):
        positions = torch.arange(ids.shape[1])[None]
        rotary = model.model.rotary_emb(x, positions)
        attended, _ = layer.self_attn(layer.input_layernorm(x), rotary, attention_mask=None)
        normed = layer.post_attention_layernorm(x + attended)
        gate, up = layer.mlp.gate_proj(normed), layer.mlp.up_proj(normed)
        found.append(torch.nn.functional.silu(gate) * up)
    return found


def test_activation_scores_equal_a_direct_computation(tiny_llama):
    ids = tiny.tokens(3, 9)
    order = channel_order(tiny_llama, bound(tiny_llama), "activation", [batch(ids)])
    for number, x in enumerate(mlp_inputs(tiny_llama, ids)):
        weight = tiny_llama.model.layers[number].mlp.down_proj.weight
        score = [float(x[..., c].norm() * weight[:, c].norm()) for c in range(64)]
        expected = sorted(range(64), key=lambda c: -score[c])
        assert order[f"model.layers.{number}.mlp_width"].tolist() == expected


def test_head_scores_sum_over_the_channels_of_a_head(tiny_llama):
    attention = tiny_llama.model.layers[0].self_attn
    space = bound(tiny_llama)
    name = "model.layers.0.attention_heads"
    for kept in (0, 1):
        attention.o_proj.weight[:, :] = 1.0
        attention.o_proj.weight[:, (1 - kept) * 16 : (2 - kept) * 16] = 1e-3
        order = channel_order(tiny_llama, space, "activation", [batch(tiny.tokens())])
        assert order[name].tolist() == [kept, 1 - kept]


@pytest.mark.parametrize("channel", [0, 17, 63])
def test_a_channel_nobody_reads_comes_last(tiny_llama, channel):
    tiny_llama.model.layers[1].mlp.down_proj.weight[:, channel] = 0
    order = channel_order(tiny_llama, bound(tiny_llama), "activation", [batch(tiny.tokens())])
    assert order["model.layers.1.mlp_width"][-1] == channel


def test_batches_add_up_and_padding_counts_for_nothing(tiny_llama):
    space = bound(tiny_llama)
    ids = tiny.tokens(2, 8)
    together = channel_order(tiny_llama, space, "activation", [batch(ids)])
    apart = channel_order(tiny_llama, space, "activation", [batch(row[None]) for row in ids])
    padded = torch.nn.functional.pad(ids, (24, 0), value=50)  # <pad> itself embeds as zero here
    mask = torch.nn.functional.pad(torch.ones_like(ids), (24, 0))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    left = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    beside = channel_order(tiny_llama, space, "activation", [left])
    for name in together:
        assert torch.equal(together[name], apart[name])
        assert torch.equal(together[name], beside[name])


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_padding_counts_for_nothing_in_any_decoder(family):
    """OPT calls its decoder that, and has no encoder."""
    model = model_of(family)
    space = SearchSpace.load(FAMILIES[family][1]).bind(model, 8)
    ids = tiny.tokens(2, 8)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (24, 0))
    left = {"input_ids": torch.nn.functional.pad(ids, (24, 0), value=50), "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}  # fmt: skip
    expected = channel_order(model, space, "activation", [batch(ids)])
    found = channel_order(model, space, "activation", [left])
    for name in expected:
        assert torch.equal(found[name], expected[name])


def test_norm_order_is_that_of_the_rows_summed_over_layers(tiny_llama):
    order = channel_order(tiny_llama, bound(tiny_llama), "norm")
    mlp, attention = tiny_llama.model.layers[0].mlp, tiny_llama.model.layers[0].self_attn
    score = [
        float(mlp.gate_proj.weight[c].abs().sum() + mlp.up_proj.weight[c].abs().sum())
        for c in range(64)
    ]
    expected = sorted(range(64), key=lambda c: -score[c])
    assert order["model.layers.0.mlp_width"].tolist() == expected
    heads = [
        float(
            attention.q_proj.weight[16 * h : 16 * h + 16].abs().sum()
            + attention.k_proj.weight[8 * h : 8 * h + 8].abs().sum()
            + attention.v_proj.weight[8 * h : 8 * h + 8].abs().sum()
        )
        for h in range(2)
    ]
    expected = sorted(range(2), key=lambda h: -heads[h])
    assert order["model.layers.0.attention_heads"].tolist() == expected


def test_none_is_the_identity(tiny_llama):
    for name, order in channel_order(tiny_llama, bound(tiny_llama), "none").items():
        assert order.tolist() == list(range(2 if name.endswith("heads") else 64))


@pytest.mark.parametrize("mode", ["activation", "norm", "none"])
def test_an_order_is_a_permutation_for_every_group_with_channels(tiny_llama, mode):
    space = bound(tiny_llama)
    found = channel_order(tiny_llama, space, mode, [batch(tiny.tokens())])
    assert found.keys() == {group.name for group in space if group.dim != "rank"}
    for group in space:
        if group.name in found:
            order = found[group.name]
            assert order.dtype == torch.int64
            assert order.sort().values.tolist() == list(range(group.choices[0]))


def test_calibration_leaves_no_hooks(tiny_llama):
    expected = tiny.logits(tiny_llama, tiny.tokens())
    channel_order(tiny_llama, bound(tiny_llama), "activation", [batch(tiny.tokens())])
    with pytest.raises(ValueError):
        channel_order(tiny_llama, bound(tiny_llama), "activation", [{"nonsense": 1}])
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())
    assert torch.equal(tiny.logits(tiny_llama, tiny.tokens()), expected)


def test_units_move_whole():
    order = torch.tensor([2, 0, 1])
    assert channel_index(order, Cut("site", "in", 2)).tolist() == [4, 5, 0, 1, 2, 3]
    fused = channel_index(order, Cut("site", "out", 3, (2, 1)))
    assert fused.tolist() == [4, 5, 0, 1, 2, 3, 8, 6, 7]
