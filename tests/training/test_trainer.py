"""Training changes the factors and nothing else, and a run that was killed ends up the same."""

import dataclasses

import pytest
import torch
from transformers import TrainingArguments

from elastic import data
from elastic.adapters.layers import ElasticLinear
from elastic.config import (
    ModelConfig,
    ScheduleConfig,
    StageConfig,
    TaskConfig,
)
from elastic.data.encoding import encode_all
from elastic.files import read_json
from elastic.models import loading
from elastic.models.modules import modules_of
from elastic.run import Run
from elastic.spaces.dims import channel_index
from elastic.supernet.store import load_run
from elastic.training import one_task, trainer
from elastic.training.callbacks import MetricsFile
from elastic.training.one_task import train_one
from elastic.training.schedule import Schedule
from elastic.training.trainer import ElasticTrainer
from tests.helpers import tiny
from tests.helpers.tiny_runs import (
    assert_same_factors,
    factors,
    interrupted,
    metrics,
    train_config,
)

OPEN = StageConfig(train_dims=["rank", "width", "heads"], epochs=2)


@pytest.fixture
def built(monkeypatch):
    """The supernets that training builds, with the state each had at the start."""
    nets = []
    build = one_task.build

    def remembered(*args, **kwargs):
        net = build(*args, **kwargs)
        nets.append((net, {k: v.clone() for k, v in net.model.state_dict().items()}))
        return net

    monkeypatch.setattr(one_task, "build", remembered)
    return nets


# What training does.


def test_training_lowers_the_loss(tiny_folder, tmp_path):
    config = train_config(
        tiny_folder,
        tmp_path / "run",
        stages=[StageConfig(epochs=6)],
        lr=ScheduleConfig(base_lr=0.01),
    )
    losses = [row["loss"] for row in metrics(train_one(config))]
    per_epoch = len(losses) // 6
    first, last = sum(losses[:per_epoch]), sum(losses[-per_epoch:])
    assert last < 0.8 * first


def test_only_factors_change(tiny_folder, tmp_path, built):
    train_one(train_config(tiny_folder, tmp_path / "run"))
    [(net, before)] = built
    after = net.model.state_dict()
    assert after.keys() == before.keys()
    adapted = {name for name in after if ".adapter." in name}
    assert adapted
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) is (name not in adapted), name
    assert net.current == net.space.maximal()


def test_base_weights_are_the_originals_up_to_the_channel_order(tiny_folder, tmp_path, built):
    train_one(train_config(tiny_folder, tmp_path / "run"))
    [(net, _)] = built
    config = ModelConfig(path=str(tiny_folder), dtype="float32", device="cpu")
    original = loading.load_model(str(tiny_folder), config).state_dict()
    moved = 0
    for group in net.space:
        for cut in group.cuts:
            if cut.axis != "rank":
                index = channel_index(net.order[group.name], cut)
                moved += not torch.equal(index, torch.arange(len(index)))
                name = f"{cut.site}.weight"
                axis = 0 if cut.axis == "out" else 1
                original[name] = original[name].index_select(axis, index)
    assert moved  # activation order is not the identity here
    state = net.model.state_dict()
    found = {name.replace(".base.", "."): tensor for name, tensor in state.items()
             if ".adapter." not in name}  # fmt: skip
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(found[name], tensor), name


def test_same_seed_same_factors(tiny_folder, tmp_path):
    one, two, other = (
        train_one(train_config(tiny_folder, tmp_path / name, seed=seed))
        for name, seed in (("one", 3), ("two", 3), ("other", 4))
    )
    assert_same_factors(one, two)
    assert not torch.equal(*(next(iter(factors(run).values())) for run in (one, other)))


@pytest.mark.parametrize(
    "settings",
    [
        {"stages": [dataclasses.replace(OPEN, init_lr=3e-3, warmup_steps=3, epochs_lr=3)]},
        {"stages": [StageConfig(), OPEN], "lr": ScheduleConfig(base_lr=2e-3, warmup_epochs=0.5)},
    ],
    ids=["per stage", "global"],
)
def test_learning_rates_are_the_schedules(tiny_folder, tmp_path, monkeypatch, settings):
    used = []

    def note(self, args, state, control, optimizer=None, **kwargs):
        used.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(MetricsFile, "on_pre_optimizer_step", note, raising=False)
    config = train_config(tiny_folder, tmp_path / "run", **settings)
    run = train_one(config)
    schedule = Schedule(config.stages, config.lr, steps_per_epoch=4)
    expected = [schedule.learning_rate(step) for step in range(schedule.steps)]
    assert len(set(expected)) > 4
    assert used == pytest.approx(expected, rel=1e-12)
    assert [row["step"] for row in metrics(run)] == list(range(1, schedule.steps + 1))
    assert [row["learning_rate"] for row in metrics(run)] == pytest.approx(expected, rel=1e-12)


# Which sub-adapter, and whose loss.


@pytest.fixture
def visits(monkeypatch):
    """(step, micro_batch, drawn, active during the loss) of every micro-batch."""
    seen, drawn = [], []
    visits, compute_loss = trainer.visits, ElasticTrainer.compute_loss

    def spied(mode, space, schedule, step, *, draw=0, **settings):
        [sub] = visits(mode, space, schedule, step, draw=draw, **settings)
        drawn.append((step, draw, sub))
        return (sub,)

    def loss(self, *args, **kwargs):
        seen.append((*drawn[-1], self.net.current))
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(trainer, "visits", spied)
    monkeypatch.setattr(ElasticTrainer, "compute_loss", loss)
    return seen


@pytest.mark.parametrize("each", ["step", "micro_batch"])
def test_how_often_a_sub_adapter_is_drawn(tiny_folder, tmp_path, visits, each):
    """24 examples are 3 micro-batches: the second step of every epoch has one of them only."""
    config = train_config(
        tiny_folder, tmp_path / "run", stages=[OPEN], sample_each=each, accumulation=2,
        task=TaskConfig(train_examples=24, validation_examples=8, test_examples=8),
    )  # fmt: skip
    train_one(config)
    assert all(drawn == active for *_, drawn, active in visits)
    place = {"step": [0, 0, 0], "micro_batch": [0, 1, 0]}[each]
    steps = [0, 0, 1, 2, 2, 3]
    assert [(step, micro) for step, micro, *_ in visits] == list(zip(steps, place * 2, strict=True))
    in_a_step = {}
    for step, _, drawn, _ in visits:
        in_a_step.setdefault(step, set()).add(drawn)
    assert max(map(len, in_a_step.values())) == {"step": 1, "micro_batch": 2}[each]


def gradients(folder, run, monkeypatch, **settings):
    """Of the first optimiser step, before clipping could hide a wrong scale; by parameter."""
    found = []

    def note(self, args, state, control, model=None, **kwargs):
        if not found:
            named = model.named_parameters()
            found.append({n: p.grad.clone() for n, p in named if p.requires_grad})

    build = one_task.build
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "on_pre_optimizer_step", note, raising=False)
        patch.setattr(one_task, "build", lambda *a, **k: tiny.randomize_(build(*a, **k)))
        train_one(train_config(folder, run, stages=[StageConfig()], max_grad_norm=1e9, **settings))
    return found[0], metrics(Run(run))[0]["loss"]


@pytest.mark.parametrize("each", ["step", "micro_batch"])
def test_accumulated_batches_are_one_large_batch(tiny_folder, tmp_path, monkeypatch, each):
    """The loss is the mean over the answer tokens of the whole step: micro-batches with long
    answers weigh more."""
    whole, loss = gradients(tiny_folder, tmp_path / "whole", monkeypatch, batch_size=16)
    for accumulation in (2, 4):
        parts, again = gradients(
            tiny_folder, tmp_path / f"{accumulation}", monkeypatch,
            batch_size=16 // accumulation, accumulation=accumulation, sample_each=each,
        )  # fmt: skip
        assert parts.keys() == whole.keys()
        for name, gradient in whole.items():
            assert gradient.abs().max() > 0, name
            # Sums of float32 in another order, over sixteen sequences.
            torch.testing.assert_close(
                parts[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max())
            )
        assert again == pytest.approx(loss, rel=1e-5)


def test_every_adapted_layer_is_trained(tiny_folder, tmp_path, built):
    train_one(train_config(tiny_folder, tmp_path / "run"))
    [(net, before)] = built
    layers = [(s, m) for s, m in modules_of(net.model, ElasticLinear) if m.adapter is not None]
    assert {site for site, _ in layers} == set(net.space.targets)
    for site, layer in layers:
        assert before[f"{site}.adapter.B"].abs().max() == 0
        assert layer.adapter.B.abs().max() > 0


@pytest.mark.parametrize(("most", "steps"), [(3, 3), (6, 6), (99, 8)])
def test_max_steps_ends_it_within_an_epoch_or_after_one(tiny_folder, tmp_path, most, steps):
    run = train_one(train_config(tiny_folder, tmp_path / "run", max_steps=most))
    assert [row["step"] for row in metrics(run) if "loss" in row][-1] == steps
    assert read_json(run.super_adapter / "about.json")["steps"] == steps


def test_what_is_loaded_again_is_what_was_trained(tiny_folder, tmp_path, built):
    run = train_one(train_config(tiny_folder, tmp_path / "run", lr=ScheduleConfig(base_lr=0.05)))
    [(net, _)] = built
    loaded = load_run(run)[2]
    ids = tiny.tokens()
    for sub in (net.space.maximal(), net.space.heuristic(), net.space.minimal()):
        with net.active(sub) as model, loaded.active(sub) as again:
            assert torch.equal(tiny.logits(again, ids), tiny.logits(model, ids))


# Methods


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_every_method_learns(tiny_folder, tmp_path, method):
    config = train_config(
        tiny_folder,
        tmp_path / "run",
        adapter=dataclasses.replace(tiny.ADAPTERS[method], alpha=None),
        stages=[StageConfig(epochs=3), StageConfig(train_dims=["rank", "width", "heads"])],
        lr=ScheduleConfig(base_lr=0.01),
    )
    run = train_one(config)
    losses = [row["loss"] for row in metrics(run)]
    assert sum(losses[8:12]) < 0.97 * sum(losses[:4])
    _, base, net = load_run(run)
    assert net.space.minimal() != net.space.maximal()
    assert base.digest


def test_a_killed_soslora_run_ends_like_one_that_was_not(tiny_folder, tmp_path, monkeypatch):
    """Its schedules are functions of the step, so resuming needs no state of them."""
    settings = dict(adapter=tiny.ADAPTERS["soslora"])
    whole = train_one(train_config(tiny_folder, tmp_path / "whole", **settings))
    config = train_config(tiny_folder, tmp_path / "killed", **settings)
    interrupted(config, monkeypatch, 5)
    assert_same_factors(train_one(config), whole)


@pytest.mark.parametrize(("ratio", "again"), [(1.0, False), (4.0, False), (4.0, True)])
def test_output_side_factors_learn_at_their_own_rate(
    tiny_folder, tmp_path, monkeypatch, ratio, again
):
    """After one step of Adam every entry has moved by its learning rate; also where transformers
    asks twice for the optimiser, as it does for DeepSpeed."""
    create = ElasticTrainer.create_optimizer
    if again:
        monkeypatch.setattr(
            ElasticTrainer, "create_optimizer", lambda self, *some: (create(self, *some),
                                                                     create(self, *some))[1]
        )  # fmt: skip
    adapter = dataclasses.replace(tiny.ADAPTERS["soslora"], lr_ratio=ratio)
    config = train_config(
        tiny_folder, tmp_path / "run", adapter=adapter, stages=[StageConfig()],
        lr=ScheduleConfig(base_lr=1e-3, shape="constant"), batch_size=32, save_steps=1,
    )  # fmt: skip
    run = train_one(config)
    base = loading.load(config.model)
    start = one_task.build(
        base.model, run.space(), config,
        calibration=encode_all(
            base.tokenizer, data.load_task(config.task, 0).train, base.model
        ),
        pad=tiny.PAD,
    ).factor_state()  # fmt: skip
    moved = {"A": [], "B": []}
    for name, tensor in factors(run).items():
        leaf = name.rpartition(".")[2]
        if leaf in moved:
            moved[leaf].append((tensor - start[name]).abs().flatten())
    # B starts at zero, so A has no gradient of the task yet; B has.
    largest = torch.cat(moved["B"]).quantile(0.5).item()
    assert largest == pytest.approx(1e-3 * ratio, rel=0.01)
    assert torch.cat(moved["A"]).max().item() < 1.01e-3


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_shapes_of_the_learning_rate(shape):
    schedule = Schedule([StageConfig()], ScheduleConfig(base_lr=2.0, shape=shape), 10)
    rates = [schedule.learning_rate(step) for step in range(10)]
    middle = {"constant": 2.0, "linear": 1.0, "cosine": 1.0}[shape]
    assert rates[0] == 2.0 and rates[5] == pytest.approx(middle)
    assert rates == sorted(rates, reverse=True)
    assert schedule.configured_rate(9) == 2.0
    own = Schedule([StageConfig(init_lr=3.0), StageConfig(init_lr=0.5)], ScheduleConfig(), 10)
    assert [own.configured_rate(step) for step in (0, 9, 10)] == [3.0, 3.0, 0.5]


def test_schedules_of_soslora_follow_the_steps(tiny_folder, tmp_path):
    """What is saved is the temperature of the last step, counted from 0."""
    settings = dataclasses.replace(tiny.ADAPTERS["soslora"].soslora, gate_anneal=1.0)
    adapter = dataclasses.replace(tiny.ADAPTERS["soslora"], soslora=settings)
    run = train_one(train_config(tiny_folder, tmp_path / "run", adapter=adapter))
    steps = len(metrics(run))
    assert steps == 8
    expected = 2.0 + (steps - 1) / steps * (1.0 - 2.0)
    found = [float(t) for name, t in factors(run).items() if name.endswith("temperature")]
    assert found == pytest.approx([expected] * len(found)) and found


def test_a_process_trains_on_one_device_of_several(tiny_folder, tmp_path, monkeypatch):
    """The Trainer would split every batch over all of them, and steps would be fewer."""
    alone = train_one(train_config(tiny_folder, tmp_path / "alone"))
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    run = train_one(train_config(tiny_folder, tmp_path / "several"))
    assert_same_factors(run, alone)
