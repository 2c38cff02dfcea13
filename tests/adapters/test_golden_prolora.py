"""PRoLoRA against outputs of its published implementation (tests/helpers/golden.py)."""

from __future__ import annotations

import pytest
import torch

from elastic.config import AdapterConfig, ProloraConfig
from tests.helpers.golden import (
    Case,
    adapter_of,
    delta,
    load_,
    names,
    task_gradients,
    trained_numbers,
)


@pytest.mark.parametrize("name", names("prolora", "A_chunk"))
def test_prolora_layer(name):
    case = Case(name)
    c = case.config
    settings = ProloraConfig(
        unshared_rank=c["unshared_rank"], share_in=c["share_A"], share_out=c["share_B"]
    )
    config = AdapterConfig(method="prolora", rank=c["rank"], alpha=c["alpha"], prolora=settings)
    adapter = adapter_of(config, case["W0"])
    assert trained_numbers(adapter) == case.scalars["trainable_parameters"]
    for parameter in (adapter.A_chunk, adapter.A_unshared):
        assert (parameter.abs() <= case.scalars["init_bound"]).all()
    if adapter.A_chunk.numel() > 20:
        assert adapter.A_chunk.abs().max() > 0.8 * case.scalars["init_bound"]
    plain = AdapterConfig(
        method="prolora",
        rank=c["rank"],
        prolora=ProloraConfig(**{**vars(settings), "rectified": False}),
    )
    if adapter.A_chunk.numel() > 20:
        largest = adapter_of(plain, case["W0"]).A_chunk.abs().max()
        bound = case.scalars["init_bound_unrectified"]
        assert 0.8 * bound < largest <= bound
    load_(adapter, case)
    for key, gradient in task_gradients(adapter, case).items():
        case.same(gradient, f"task_grad_{key}")
    A, B = adapter.factors(adapter.max_rank)
    # The reference's order has the unshared ranks last.
    shared = c["rank"] - c["unshared_rank"]
    order = [*range(shared, c["rank"]), *range(shared)]
    torch.testing.assert_close(A, case["A_full"][order], **case.tolerance)
    torch.testing.assert_close(B / adapter.scale, case["B_full"][:, order], **case.tolerance)
    torch.testing.assert_close(B @ A, case["factor_B"] @ case["factor_A"], **case.tolerance)
    case.same(delta(adapter, case.scalars["elastic_k"]), "delta_W_elastic")
