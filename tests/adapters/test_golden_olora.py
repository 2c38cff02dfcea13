"""O-LoRA against outputs of its published implementation (tests/helpers/golden.py)."""

from __future__ import annotations

import pytest
import torch

from elastic.adapters import METHODS
from elastic.config import AdapterConfig, OloraConfig
from tests.helpers.golden import (
    Case,
    adapter_of,
    delta,
    forward,
    names,
    trained_numbers,
)


def olora(config: dict, **settings) -> AdapterConfig:
    settings = {"lambda_1": config["lambda_1"], "lambda_2": config["lambda_2"], **settings}
    return AdapterConfig(
        method="olora", rank=config["rank"], alpha=config["alpha"], olora=OloraConfig(**settings)
    )


def with_past(config: AdapterConfig, case: Case, weight: torch.Tensor, prefix: str = ""):
    adapter = adapter_of(config, weight)
    state = {name: case[prefix + name] for name in ("A_old", "B_old")}
    adapter.load(state | {"A": case[prefix + "A_new"], "B": case[prefix + "B_new"]})
    return adapter


@pytest.mark.parametrize("name", names("olora", "delta_W_elastic"))
def test_olora_layer(name):
    case = Case(name)
    adapter = with_past(olora(case.config), case, case["W0"])
    assert trained_numbers(adapter) == case.scalars["trainable_parameters"]
    bias = case.tensors.get("bias")
    y = forward(adapter, case["x"], case["W0"], bias)
    case.same(y, "y")
    case.same(delta(adapter), "delta_W")
    case.same(case["W0"] + delta(adapter), "W_merged")
    task = (y * case["grad_y"]).sum()
    case.same(task, "task_loss")
    penalty = adapter.penalty(adapter.max_rank)
    total = task if penalty is None else task + penalty
    case.same(total, "total_loss")
    total.backward()
    case.same(adapter.A.grad, "total_grad_A_new")
    case.same(adapter.B.grad, "total_grad_B_new")
    for part, settings in (
        ("orth", {"lambda_1": 1.0, "lambda_2": 0.0}),
        ("l2", {"lambda_1": 0.0, "lambda_2": 1.0}),
    ):
        alone = with_past(olora(case.config, **settings), case, case["W0"])
        penalty = alone.penalty(alone.max_rank)
        if penalty is None:  # no finished task: exactly nothing
            assert case[f"{part}_loss"] == 0 and not case[f"{part}_grad_A_new"].any()
            continue
        case.same(penalty, f"{part}_loss")
        penalty.backward()
        case.same(alone.A.grad, f"{part}_grad_A_new")
    alone.B.data.zero_()
    alone.zero_grad()
    alone.penalty(alone.max_rank).backward()
    case.same(alone.B.grad, "l2_grad_B_new_at_zero")
    squared = {"lambda_1": 1.0, "lambda_2": 0.0, "orthogonality": "squared"}
    paper = with_past(olora(case.config, **squared), case, case["W0"])
    penalty = paper.penalty(paper.max_rank)
    case.same(torch.zeros(()).double() if penalty is None else penalty, "paper_orth_loss")
    all_tasks = with_past(olora(case.config, shrink="all"), case, case["W0"])
    case.same(delta(all_tasks, case.scalars["elastic_k"]), "delta_W_elastic")
    case.same(delta(all_tasks), "delta_W")
    adapter.succeed(adapter.state_dict(), torch.Generator())
    case.same(adapter.A_old, "A_saved")
    case.same(adapter.B_old, "B_saved")


def test_olora_sums_over_layers():
    case = Case("olora_two_layers_reg")
    adapters = {
        layer["name"]: with_past(
            olora(case.config),
            case,
            torch.zeros(layer["out_features"], layer["in_features"]).double(),
            f"{layer['name']}.",
        )
        for layer in case.config["layers"]
    }
    terms = [adapter.penalty(adapter.max_rank) for adapter in adapters.values()]
    total = METHODS["olora"].total(terms, learning_rate=0.1)
    case.same(total, "reg_total")
    total.backward()
    for name, adapter in adapters.items():
        case.same(adapter.A.grad, f"reg_grad.{name}.A_new")
        case.same(adapter.B.grad, f"reg_grad.{name}.B_new")


def test_olora_hands_over_from_task_to_task():
    case = Case("olora_task_chain")
    config = AdapterConfig(method="olora", rank=case.config["rank"], alpha=case.config["alpha"])
    adapter = adapter_of(config, case["W0"])
    for task in range(case.config["tasks"]):
        if task:
            state = adapter.state_dict()
            adapter = adapter_of(config, case["W0"])
            adapter.succeed(state, torch.Generator())
        case.same(adapter.A_old, f"task{task}.A_old")
        case.same(adapter.B_old, f"task{task}.B_old")
        case.same(forward(adapter, case["x"], case["W0"]), f"task{task}.y_start")
        adapter.A.data.copy_(case[f"task{task}.A_new"])
        adapter.B.data.copy_(case[f"task{task}.B_new"])
        case.same(forward(adapter, case["x"], case["W0"]), f"task{task}.y_end")
        case.same(torch.cat([adapter.A_old, adapter.A]), f"task{task}.A_saved")
        case.same(torch.cat([adapter.B_old, adapter.B], 1), f"task{task}.B_saved")
    case.same(delta(adapter), "delta_W_final")
