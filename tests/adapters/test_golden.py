"""Every method against outputs of its published implementation.

The files in tests/golden come from the reference repositories, one thread on a CPU; the JSON beside
each names the repository, its commit and the meaning of every tensor. Tolerances are the files'.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from elastic.adapters import METHODS
from elastic.adapters.soslora import cross_expert
from elastic.config import AdapterConfig, OloraConfig, ProloraConfig, SorsaConfig, SosLoraConfig

GOLDEN = Path(__file__).parents[1] / "golden"


class Case:
    """A golden file; `same` compares whole tensors at its tolerance."""

    def __init__(self, name: str) -> None:
        self.about = json.loads((GOLDEN / f"{name}.json").read_text())
        self.config = self.about["config"]
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")
        self.scalars = {key: item["value"] for key, item in self.about["scalars"].items()}
        tolerance = self.about["tolerance"]
        self.tolerance = {"rtol": tolerance["rtol"], "atol": tolerance["atol"]}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def same(self, found: torch.Tensor, name: str) -> None:
        expected = self[name]
        torch.testing.assert_close(found.reshape(expected.shape), expected, **self.tolerance)


def names(prefix: str, needed: str) -> list[str]:
    """Cases of a method that hold a certain tensor."""
    files = sorted(GOLDEN.glob(f"{prefix}_*.json"))
    return [f.stem for f in files if needed in json.loads(f.read_text())["tensors"]]


def adapter_of(config: AdapterConfig, weight: torch.Tensor, dtype=torch.float64):
    adapter = METHODS[config.method](config, *weight.shape, dtype=dtype)
    adapter.start(weight, torch.Generator().manual_seed(0))
    return adapter


def load_(adapter, case: Case, prefix: str = "", **renamed: str) -> None:
    for name, parameter in adapter.named_parameters():
        parameter.data.copy_(case[prefix + renamed.get(name, name)])


def forward(adapter, x: torch.Tensor, weight: torch.Tensor, bias=None, rank=None) -> torch.Tensor:
    A, B = adapter.factors(rank or adapter.max_rank)
    return nn.functional.linear(x, weight, bias) + x @ A.T @ B.T


def delta(adapter, rank: int | None = None) -> torch.Tensor:
    A, B = adapter.factors(rank or adapter.max_rank)
    return (B @ A).detach()


def trained_numbers(adapter) -> int:
    return sum(p.numel() for p in adapter.parameters() if p.requires_grad)


def task_gradients(adapter, case: Case) -> dict[str, torch.Tensor]:
    """Outputs and merge are checked on the way: they hold in every case alike."""
    bias = case.tensors.get("bias")
    y = forward(adapter, case["x"], case["W0"], bias)
    case.same(y, "y")
    case.same(case["W0"] + delta(adapter), "W_merged")
    case.same(delta(adapter), "delta_W")
    adapter.zero_grad()
    (y * case["grad_y"]).sum().backward()
    return {name: p.grad.clone() for name, p in adapter.named_parameters()}


# --- SORSA ---


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


# --- PRoLoRA ---


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


# --- O-LoRA ---


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


# --- SOS-LoRA ---


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
