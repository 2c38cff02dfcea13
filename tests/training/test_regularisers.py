"""A regulariser counts once, wherever and however it is added."""

import dataclasses

import pytest
import torch

from elastic.config import (
    OloraConfig,
    ScheduleConfig,
)
from elastic.run import Run
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.steps import step_gradients
from tests.helpers.tiny_runs import (
    logged,
    metrics,
    train_config,
)


@pytest.mark.parametrize("method", ["sorsa", "olora", "soslora"])
def test_a_regulariser_counts_once_whatever_the_accumulation(tiny_folder, tmp_path, method):
    _, whole = step_gradients(tiny_folder, tmp_path, method, batch_size=16, accumulation=1)
    _, parts = step_gradients(tiny_folder, tmp_path, method, batch_size=4, accumulation=4)
    net = tiny.supernet(method)
    net.advance(0, 1)
    penalty = net.penalty(ScheduleConfig().base_lr)
    trained = {n: p for n, p in net.model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(penalty, list(trained.values()), allow_unused=True)
    visible = 0
    for (name, _), gradient in zip(trained.items(), gradients, strict=True):
        # SOS-LoRA's gate is float32 inside, as published.
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-6, atol=1e-6)
        if gradient is not None and gradient.norm() > 1e-3 * whole[name].norm():
            visible += 1  # so that a doubled regulariser would show above
    assert visible


@pytest.mark.parametrize("method", ["sorsa", "soslora"])
def test_a_regulariser_in_the_loss_is_one_beside_it(tiny_folder, tmp_path, method):
    """DeepSpeed takes no gradient after its backward pass. What is logged is the task's loss."""
    size = dict(batch_size=4, accumulation=4)
    rows = []
    for in_loss in (False, True):
        folder = tmp_path / str(in_loss)
        _, seen = step_gradients(tiny_folder, folder, method, in_loss=in_loss, **size)
        rows.append((seen, logged(Run(folder / f"{method}-4-4"))))
    (beside, mine), (inside, theirs) = rows
    for name, gradient in inside.items():
        torch.testing.assert_close(gradient, beside[name], rtol=1e-9, atol=1e-12)
    for row, other in zip(theirs, mine, strict=True):
        assert row["penalty"] == pytest.approx(other["penalty"])
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert abs(row["penalty"]) > 1e-4


@pytest.mark.parametrize("method", ["sorsa", "olora"])
def test_the_gradient_is_the_tasks_and_the_regularisers(tiny_folder, tmp_path, method):
    """Clipping acts on the sum, except for SORSA, whose regulariser is added after it."""
    size = dict(batch_size=16, accumulation=1)
    _, free = step_gradients(tiny_folder, tmp_path, method, **size)
    net = tiny.supernet(method)
    penalty = net.penalty(ScheduleConfig().base_lr)
    trained = {n: p for n, p in net.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(penalty, list(trained.values()), allow_unused=True)
    added = {n: 0 if g is None else g for n, g in zip(trained, found, strict=True)}
    task = {name: gradient - added[name] for name, gradient in free.items()}
    _, clipped = step_gradients(tiny_folder, tmp_path / "clip", method, max_grad_norm=0.5, **size)
    before = task if method == "sorsa" else free
    norm = torch.stack([g.norm() for g in before.values()]).norm()
    assert norm > 0.5
    for name, gradient in clipped.items():
        expected = before[name] * 0.5 / (norm + 1e-6)
        if method == "sorsa":
            expected = expected + added[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_a_regulariser_is_as_exact_over_a_bfloat16_base(tiny_folder, tmp_path):
    net = tiny.supernet("olora", dtype=torch.bfloat16)
    wide = tiny.supernet("olora", dtype=torch.float32)
    net.load_factors(wide.factor_state())
    assert torch.equal(net.penalty(1e-3), wide.penalty(1e-3))
    assert net.penalty(1e-3).dtype == torch.float32


def test_the_loss_logged_is_the_tasks_alone(tiny_folder, tmp_path):
    rows = {}
    for weight in (0.0, 5.0):
        adapter = dataclasses.replace(tiny.ADAPTERS["olora"], olora=OloraConfig(lambda_2=weight))
        run = train_one(train_config(tiny_folder, tmp_path / str(weight), adapter=adapter))
        rows[weight] = metrics(run)[0]
    assert rows[0.0]["loss"] == rows[5.0]["loss"]
    assert "penalty" not in rows[0.0] and rows[5.0]["penalty"] > 1
