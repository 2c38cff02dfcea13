"""SORSA against outputs of its published implementation (tests/helpers/golden.py)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elastic.adapters import METHODS
from elastic.config import AdapterConfig, SorsaConfig
from tests.helpers.golden import (
    Case,
    adapter_of,
    delta,
    forward,
    load_,
    names,
    task_gradients,
    trained_numbers,
)


def sorsa(config: dict, **settings) -> AdapterConfig:
    settings = {"gamma": 1.0, **settings}
    return AdapterConfig(
        method="sorsa",
        rank=config["rank"],
        alpha=config.get("alpha"),
        sorsa=SorsaConfig(**settings),
    )


@pytest.mark.parametrize("name", names("sorsa", "factor_A"))
def test_sorsa_layer(name):
    case = Case(name)
    adapter = adapter_of(sorsa(case.config), case["W0"])
    assert trained_numbers(adapter) == case.scalars["trainable_parameters"]
    # Signs of singular vectors are arbitrary, products are not.
    case.same(adapter.S.data, "S_init")
    principal = (adapter.B * adapter.S) @ adapter.A
    torch.testing.assert_close(
        principal, (case["B_init"] * case["S_init"]) @ case["A_init"], **case.tolerance
    )
    case.same(case["W0"] - adapter.scale * principal, "W_residual")
    case.same(forward(adapter, case["x"], case["W0"], case.tensors.get("bias")), "y_init")
    load_(adapter, case)
    for key, gradient in task_gradients(adapter, case).items():
        case.same(gradient, f"task_grad_{key}")
    adapter.zero_grad()
    penalty = adapter.total([adapter.penalty(adapter.max_rank)], learning_rate=1.0)
    penalty.backward()
    case.same(penalty, "reg")
    case.same(adapter.A.grad, "reg_grad_A")
    case.same(adapter.B.grad, "reg_grad_B")
    assert adapter.S.grad is None
    rank = case.scalars["elastic_k"]
    case.same(delta(adapter, rank), "delta_W_elastic")
    A, B = adapter.factors(adapter.max_rank)
    torch.testing.assert_close(B @ A, case["factor_B"] @ case["factor_A"], **case.tolerance)
    assert A.shape == case["factor_A"].shape


def test_sorsa_from_a_bfloat16_base():
    """Adapters in float32; the rounding of the published residual weight does not occur here."""
    case = Case("sorsa_bf16_residual")
    adapter = adapter_of(sorsa(case.config), case["W0"], torch.float32)
    principal = (adapter.B * adapter.S) @ adapter.A
    expected = (case["B_init"] * case["S_init"]) @ case["A_init"]
    torch.testing.assert_close(principal.data, expected, **case.tolerance)
    load_(adapter, case)
    case.same(delta(adapter), "delta_W_lowrank")
    # What the reference merged carries its rounding error, given as a tensor of its own.
    exact = case["W0"].float() + delta(adapter)
    wide = {name: case[name].float() for name in ("W_merged", "rounding_error", "W_residual")}
    torch.testing.assert_close(exact + wide["rounding_error"], wide["W_merged"], **case.tolerance)
    residual = case["W0"].float() - principal.data
    torch.testing.assert_close(
        residual, wide["W_residual"], **case.about["tolerance"]["W_residual"]
    )
    x = case["x"].float()
    y = forward(adapter, x, case["W0"].float() + wide["rounding_error"])
    torch.testing.assert_close(y.data, case["y"].float(), **case.tolerance)


def test_sorsa_at_full_rank_and_at_zero_penalty():
    case = Case("sorsa_full_rank_edges")
    adapter = adapter_of(sorsa(case.config), case["W0"])
    case.same(adapter.S.data, "S_init")
    case.same(forward(adapter, case["x"], case["W0"]), "y_init")
    adapter.A.data.copy_(case["A_eye"])
    adapter.B.data.copy_(case["B_eye"])
    penalty = adapter.penalty(adapter.max_rank)
    penalty.backward()
    case.same(penalty, "reg_eye")
    case.same(adapter.A.grad, "reg_eye_grad_A")
    case.same(adapter.B.grad, "reg_eye_grad_B")


def test_sorsa_accumulates_clips_then_regularises():
    case = Case("sorsa_model_step")
    config = case.config
    layers = []
    for number, layer in enumerate(config["layers"]):
        settings = sorsa(layer, gamma=config["gamma"])
        adapter = adapter_of(settings, case[f"layer{number}.W0"])
        load_(adapter, case, f"layer{number}.")
        layers.append((adapter, case[f"layer{number}.W0"]))
    for batch in range(config["gradient_accumulation_steps"]):
        x = case[f"x{batch}"]
        for number, (adapter, weight) in enumerate(layers):
            # The file's residual has its own initial triplets: the same function.
            A, S, B = adapter.A, adapter.S, adapter.B
            y = x @ case[f"layer{number}.W_residual"].T + x @ A.T * S @ B.T
            torch.testing.assert_close(forward(adapter, x, weight), y, **case.tolerance)
            x = torch.tanh(y) if number < len(layers) - 1 else y
        loss = ((x - case[f"t{batch}"]) ** 2).mean()
        case.same(loss, f"loss{batch}")
        (loss / config["gradient_accumulation_steps"]).backward()
    parameters = {
        f"layer{n}.{name}": p for n, (a, _) in enumerate(layers) for name, p in a.named_parameters()
    }
    for name, parameter in parameters.items():
        case.same(parameter.grad, f"grad_task.{name}")
    norm = nn.utils.clip_grad_norm_(parameters.values(), config["max_grad_norm"])
    case.same(norm, "grad_norm")
    for name, parameter in parameters.items():
        case.same(parameter.grad, f"grad_clipped.{name}")
    method = METHODS["sorsa"]
    penalty = method.total([a.penalty(a.max_rank) for a, _ in layers], config["learning_rate"])
    case.same(penalty * config["learning_rate"] / config["gamma"], "reg")
    penalty.backward()
    assert not method.clip_penalty
    for name, parameter in parameters.items():
        if f"grad_final_intended.{name}" in case.tensors:
            case.same(parameter.grad, f"grad_final_intended.{name}")
        else:
            case.same(parameter.grad, f"grad_final_reference.{name}")
    # The reference's helper divides by the accumulation count; nothing else differs.
    for name in ("layer0.A", "layer2.B"):
        clipped = case[f"grad_clipped.{name}"]
        added = parameters[name].grad - clipped
        divided = clipped + added / config["gradient_accumulation_steps"]
        case.same(divided, f"grad_final_reference.{name}")
