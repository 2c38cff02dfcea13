"""Said as plain LoRA, a super-adapter of any method has the same update at every rank."""

import pytest
import torch

from elastic.supernet.as_lora import as_lora
from tests.helpers import tiny
from tests.helpers.laws import several

FACTOR_RANKS = {
    "lora": [2, 4, 8], "sorsa": [4, 8, 16], "prolora": [2, 4, 8], "olora": [18, 20, 24],
    "olora-all": [6, 12, 24], "soslora": [4, 8, 16],
}  # fmt: skip
"""Of ranks 2, 4 and 8; O-LoRA's with two tasks of 8 behind it."""


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_smaller_ranks_are_the_first_of_all(method):
    net = tiny.supernet(method)
    plain = as_lora(net)
    assert plain.adapter.scale == 1 and plain.adapter.rank == FACTOR_RANKS[method][-1]
    for site, adapter in net.adapters():
        whole = plain.factors[f"{site}.A"], plain.factors[f"{site}.B"]
        for rank, factor_rank in zip((2, 4, 8), FACTOR_RANKS[method], strict=True):
            A, B = adapter.factors(rank)
            assert len(A) == factor_rank
            assert torch.equal(whole[0][:factor_rank], A)
            assert torch.equal(whole[1][:, :factor_rank], B)


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_its_space_has_the_same_sub_adapters(method):
    net = tiny.supernet(method, heads=True)
    plain = as_lora(net)
    space = plain.declared.bind(tiny.llama(), plain.adapter.rank)
    assert space.size == net.space.size
    for sub in several(net):
        said = space.check(plain.sub_adapter(net, sub))
        assert space.indices(said) == net.space.indices(sub)
