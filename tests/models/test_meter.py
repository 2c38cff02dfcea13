"""Operations as torch counts them."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from elastic.models import meter
from elastic.models.meter import Meter


def attention(heads: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, 5, 8), *[(2, kv_heads, 7, 8)] * 2)
    return tuple(torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)


def counted(*given: torch.Tensor) -> int:
    with Meter(given).recording() as found:
        scaled_dot_product_attention(*given, enable_gqa=True).sum().backward()
    return found.flops


def test_queries_that_share_keys_and_values_cost_what_they_do_with_their_own():
    own = counted(*attention(6, 6))
    assert counted(*attention(6, 2)) == own
    # Two products of 2 x 6 matrices of 5 x 8 x 7, twice and a half as many on the way back.
    assert own == 7 * 2 * 2 * 6 * 5 * 8 * 7


def test_a_version_of_torch_that_counts_no_groups_is_told_of_none():
    def strict(query, key, value, *rest):
        assert query.shape[:2] == tuple(key[:2]) == tuple(value[:2])
        return len(rest)

    query, key, value = attention(6, 2)
    assert meter._of_groups(strict, 0)(query, key, value, None) == 1
