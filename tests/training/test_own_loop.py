"""Elastic training in a Trainer that is not ours, through a callback."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from elastic.attached.model import ElasticModel
from elastic.config import StageConfig, TrainConfig
from elastic.errors import ConfigError, RunError
from elastic.training.own_loop import ElasticCallback, visited
from tests.helpers import tiny

OPEN = ["rank", "width", "heads"]
ALL_OPEN = dict(stages=[StageConfig(train_dims=OPEN)], progressivity=OPEN)


class Texts(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> dict:
        ids = tiny.tokens(1, 6, number)[0]
        return {"input_ids": ids, "labels": ids}


class Noting(Trainer):
    """Notes what is active in every micro-batch, and the gradients that the optimiser sees."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append(self.net.current)
        return super().training_step(model, inputs, num_items_in_batch)


def train(net, folder, settings=None, *, steps=6, accumulation=1, model=None, rate=1e-2):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, use_cpu=True,
        gradient_accumulation_steps=accumulation, report_to=[], disable_tqdm=True,
        save_strategy="no", learning_rate=rate,
    )  # fmt: skip
    trainer = Noting(
        model or net.model, arguments, train_dataset=Texts(),
        callbacks=[ElasticCallback(net, settings)],
    )  # fmt: skip
    trainer.net, trainer.seen = getattr(net, "supernet", net), []
    trainer.train()
    return trainer


def test_every_step_trains_what_it_visits_and_the_largest_is_active_behind(tmp_path):
    net = tiny.supernet(heads=True, dtype=torch.float32)
    before = net.factor_state()
    before = {name: tensor.clone() for name, tensor in before.items()}
    settings = TrainConfig(seed=3)
    trainer = train(net, tmp_path, settings, steps=10)
    wanted = [visited(net.space, step, 10, settings) for step in range(10)]
    assert [(sub,) for sub in trainer.seen] == wanted
    assert set(trainer.seen[:4]) == {net.space.maximal()} and len(set(trainer.seen)) > 4
    assert net.current == net.space.maximal() != trainer.seen[-1]
    after = net.factor_state()
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_what_is_cut_gets_no_gradient(tmp_path):
    net = tiny.supernet(heads=True, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in net.factor_state().items()}
    settings = TrainConfig(sampling="uniform", **ALL_OPEN)
    [sub] = train(net, tmp_path, settings, steps=1).seen
    kept = sub["model.layers.0.mlp_width"]
    assert kept < 64, "another seed is wanted"
    name = "model.layers.0.mlp.down_proj.A"
    moved = (net.factor_state()[name] - before[name]).abs().sum(0) > 0
    assert moved[:kept].all() and not moved[kept:].any()


def test_a_sandwich_is_laid_over_the_micro_batches_of_a_step(tmp_path):
    net = tiny.supernet(heads=True, dtype=torch.float32)
    settings = TrainConfig(sampling="sandwich", **ALL_OPEN)
    trainer = train(net, tmp_path, settings, steps=2, accumulation=3)
    wanted = [*visited(net.space, 0, 2, settings), *visited(net.space, 1, 2, settings)]
    assert trainer.seen == wanted and len(wanted) == 6
    assert wanted[0] == net.space.maximal() and wanted[2] == net.space.minimal()
    with pytest.raises(ConfigError, match="gradient_accumulation_steps 3 or more"):
        train(net, tmp_path, settings, accumulation=2)


def test_the_regulariser_adds_its_gradient_once(tmp_path, monkeypatch):
    """At a learning rate of next to nothing, what is added is the gradient of the penalty."""
    added = {}
    for regularised in (True, False):
        net = tiny.supernet("sorsa", dtype=torch.float32)
        if not regularised:
            monkeypatch.setattr(net, "penalty", lambda rate: None)
        grads = {}

        class Gradients(ElasticCallback):
            def on_pre_optimizer_step(self, *args, **kwargs):
                super().on_pre_optimizer_step(*args, **kwargs)
                self.found = {n: p.grad.clone() for n, p in self.net.model.named_parameters()
                              if p.grad is not None}  # fmt: skip

        monkeypatch.setattr("tests.training.test_own_loop.ElasticCallback", Gradients)
        trainer = train(net, tmp_path, steps=1, accumulation=2, rate=0.1)
        grads = trainer.callback_handler.callbacks
        added[regularised] = next(c for c in grads if isinstance(c, Gradients)).found
        if regularised:
            fresh = tiny.supernet("sorsa", dtype=torch.float32)
            fresh.penalty(0.1).backward()
            wanted = {n: p.grad for n, p in fresh.model.named_parameters() if p.grad is not None}
    assert wanted
    for name, gradient in wanted.items():
        difference = added[True][name] - added[False][name]
        torch.testing.assert_close(difference, gradient, atol=1e-5, rtol=1e-3)


def test_a_trainer_of_another_model_is_refused(tmp_path):
    net = tiny.supernet(dtype=torch.float32)
    other = tiny.supernet(dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"another model .*give it net\.model"):
        train(net, tmp_path, model=other.model)


def test_channels_are_not_ordered_behind_a_trainer_that_has_trained_them(tmp_path):
    net = ElasticModel(tiny.supernet(heads=True, dtype=torch.float32), tiny.tokenizer())
    train(net, tmp_path, steps=1)
    with pytest.raises(RunError, match="trained in the order that is"):
        net.order_channels([{"input_ids": tiny.tokens()}])
