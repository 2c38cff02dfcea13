"""SOS-LoRA against outputs of its published implementation (tests/helpers/golden.py)."""

from __future__ import annotations

import pytest
import torch

from elastic.adapters import METHODS
from elastic.adapters.soslora import cross_expert
from elastic.config import AdapterConfig, SosLoraConfig
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


def soslora(config: dict, **settings) -> AdapterConfig:
    keys = ("rank_mode", "scale_base", "gamma_max", "normalize_scales", "lambda_orth")
    return AdapterConfig(
        method="soslora",
        rank=config["rank_argument"],
        alpha=config["alpha"],
        soslora=SosLoraConfig(
            experts=config["num_experts"],
            gate_start=config["gate_temperature"],
            gate_end=config["gate_temperature"],
            gate_prior=config["gate_uniform_prior"],
            scale_anchor=config["scale_anchor_beta"],
            **{key: config[key] for key in keys},
            **settings,
        ),
    )


@pytest.mark.parametrize("name", names("soslora", "gate"))
def test_soslora_layer(name):
    case = Case(name)
    config = soslora(case.config)
    adapter = adapter_of(config, case["W0"])
    assert trained_numbers(adapter) == case.scalars["trainable_parameters"]
    case.same(adapter.expert_scales.data.float(), "base_scales")
    rows = adapter.A.data.flatten(0, 1)
    gram = rows @ rows.T
    if case.scalars["A_init_mode"] == "joint":
        case.same(gram, "A_init_gram")
    else:  # only each expert's own block is orthogonal
        experts, rank = adapter.A.shape[:2]
        for k in range(experts):
            own = slice(k * rank, (k + 1) * rank)
            torch.testing.assert_close(
                gram[own, own], case["A_init_gram"][own, own], **case.tolerance
            )
    load_(adapter, case)
    case.same(adapter.gates(), "gate")
    task = task_gradients(adapter, case)
    for key, gradient in task.items():
        case.same(gradient, f"task_grad_{key}")
    x = case["x"].clone().requires_grad_()
    (forward(adapter, x, case["W0"], case.tensors.get("bias")) * case["grad_y"]).sum().backward()
    case.same(x.grad, "task_grad_x")

    value = cross_expert(adapter.A)
    torch.testing.assert_close(value.item(), case.scalars["orth_value"], **case.tolerance)
    adapter.zero_grad()
    penalty = adapter.penalty(adapter.max_rank)
    penalty.backward()
    gradients = {
        key: torch.zeros_like(p) if p.grad is None else p.grad
        for key, p in adapter.named_parameters()
    }
    case.same(gradients["gate_logits"], "prior_grad_gate_logits")
    case.same(gradients["expert_scales"], "anchor_grad_expert_scales")
    if case.config["lambda_orth"]:  # the file's is that of D alone, ours is weighted
        case.same(gradients["A"] / case.config["lambda_orth"], "orth_grad_A")
    # The published LoRA+ divides the gradient of A, which Adam cancels; ours sets learning rates.
    ratio = case.config["loraplus_lr_ratio"]
    case.same((task["A"] + gradients["A"]) / ratio, "train_grad_A")
    for key in ("B", "expert_scales", "gate_logits"):
        case.same(task[key] + gradients[key], f"train_grad_{key}")

    A, B = adapter.factors(adapter.max_rank)
    torch.testing.assert_close(B @ A, case["factor_B"] @ case["factor_A"], **case.tolerance)
    assert A.shape == case["factor_A"].shape
    experts = adapter.A.shape[0]
    scales = (adapter.gates()[:, None] * adapter.expert_scales)[:, :, None]
    norms = (scales * adapter.B @ adapter.A).flatten(1).norm(dim=1)
    case.same(norms, "expert_delta_norms")
    unit = adapter.max_rank // adapter.expert_rank
    kept = unit * case.scalars["elastic_rank_per_expert"]
    case.same(delta(adapter, kept), "delta_W_elastic_rank")
    by_expert = adapter_of(soslora(case.config, elastic="experts"), case["W0"])
    load_(by_expert, case)
    kept = by_expert.max_rank * case.scalars["elastic_experts"] / experts
    if kept == int(kept):
        case.same(delta(by_expert, int(kept)), "delta_W_elastic_experts")
    else:  # rank 4 in each of 3 experts: a rank choice cannot name two experts
        A, B = by_expert.factors(by_expert.max_rank)
        rows = case.scalars["elastic_experts"] * by_expert.expert_rank
        case.same(B[:, :rows] @ A[:rows], "delta_W_elastic_experts")


@pytest.mark.parametrize("part", ["a", "b"])
def test_soslora_schedules(part):
    case = Case("soslora_schedules")
    c = case.config[part]
    config = AdapterConfig(
        method="soslora",
        rank=4,
        soslora=SosLoraConfig(
            lambda_orth=c["lambda_max"],
            orth_delay=c["orth_delay_ratio"],
            orth_ramp=c["orth_ramp_ratio"],
            gate_start=c["T_start"],
            gate_end=c["T_end"],
            gate_anneal=c["gate_anneal_ratio"],
        ),
    )
    adapter = METHODS["soslora"](config, 6, 8, dtype=torch.float64)
    found = []
    for step in range(c["max_steps"]):
        adapter.advance(step, c["max_steps"])
        found.append((adapter.penalty_weight, float(adapter.temperature)))
    weights, temperatures = (torch.tensor(column).double() for column in zip(*found, strict=True))
    case.same(weights, f"{part}.lambda")
    case.same(temperatures, f"{part}.temperature")
    # The published bfloat16 run rounded both; ours never does.
    case.same(weights.bfloat16().double(), f"{part}.lambda_bf16_buffer")
    case.same(temperatures.bfloat16().double(), f"{part}.temperature_bf16_buffer")
