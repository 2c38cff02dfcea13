"""Training changes the factors and nothing else, and a run that was killed ends up the same."""

import dataclasses
import shutil

import pytest
import torch
from transformers import TrainingArguments

from elastic import data
from elastic.adapters.layers import ElasticLinear
from elastic.config import (
    AdapterConfig,
    ModelConfig,
    OloraConfig,
    ProloraConfig,
    ScheduleConfig,
    StageConfig,
    TaskConfig,
)
from elastic.data.encoding import encode_all
from elastic.errors import ConfigError, DataError, ModelError, RunError
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
from tests.helpers.steps import step_gradients
from tests.helpers.tiny_runs import (
    assert_same_factors,
    factors,
    interrupted,
    logged,
    metrics,
    snapshot,
    space_file,
    train_config,
)

OPEN = StageConfig(train_dims=["rank", "width", "heads"], epochs=2)


@pytest.fixture
def forbid_weights(monkeypatch):
    """Loading weights fails the test."""

    def load(*_, **__):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(loading, "load_model", load)


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


# What is refused, and what is not done twice.


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    config = train_config(tiny_folder, tmp_path_factory.mktemp("finished") / "run")
    train_one(config)
    return config


def test_a_finished_run_is_not_trained_again(finished, forbid_weights):
    before = snapshot(Run(finished.run).path)
    assert train_one(finished).path == Run(finished.run).path
    assert snapshot(Run(finished.run).path) == before


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 1}, "seed"),
        ({"adapter": AdapterConfig(rank=8, alpha=1.0)}, "adapter.alpha"),
        ({"stages": [StageConfig()]}, "stages"),
    ],
)
def test_another_configuration_is_refused(finished, forbid_weights, change, named):
    before = snapshot(Run(finished.run).path)
    with pytest.raises(RunError, match=f"another run.*{named}"):
        train_one(dataclasses.replace(finished, **change))
    assert snapshot(Run(finished.run).path) == before


def test_a_moved_run_is_still_the_same(finished, forbid_weights, tmp_path):
    shutil.copytree(finished.run, tmp_path / "moved")
    train_one(dataclasses.replace(finished, run=str(tmp_path / "moved")))


def test_a_directory_of_other_things_is_refused(tiny_folder, tmp_path, forbid_weights):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        train_one(train_config(tiny_folder, tmp_path / "run"))
    assert list(snapshot(tmp_path / "run")) == ["letter.txt"]


def _strange_block(space: dict) -> None:
    space["blocks"] = "transformer.h.*"


def _rank_too_large(space: dict) -> None:
    space["groups"]["mlp_rank"]["choices"] = [9]


@pytest.mark.parametrize("spoil", [_strange_block, _rank_too_large])
def test_a_bad_space_is_refused_before_weights(tiny_folder, tmp_path, forbid_weights, spoil):
    declared = tiny.space_dict()
    spoil(declared)
    space = space_file(tmp_path / "spaces", declared)
    with pytest.raises(ConfigError, match=r"tiny-space\.yaml"):
        train_one(train_config(tiny_folder, tmp_path / "run", space=space))
    assert not (tmp_path / "run").exists()


def test_an_unknown_space_is_refused_before_weights(tiny_folder, tmp_path, forbid_weights):
    with pytest.raises(ConfigError, match=r"lama.*did you mean 'llama'"):
        train_one(train_config(tiny_folder, tmp_path / "run", space="lama"))


def test_an_order_that_changes_the_model_is_refused(tiny_folder, tmp_path, monkeypatch):
    """Moving the channels of gate and down, but not those of up: where shapes tell nothing, because
    the model needs values, numbers do."""
    monkeypatch.setattr(one_task, "require_fits", lambda *_: None)
    declared = tiny.space_dict()
    declared["groups"]["mlp_width"]["outputs"] = ["mlp.gate_proj"]
    space = space_file(tmp_path, declared)
    with pytest.raises(ConfigError, match="does not name all layers that share its channels"):
        train_one(train_config(tiny_folder, tmp_path / "run", space=space))


@pytest.mark.parametrize("content", [None, "", "\n\n", "{broken"])
def test_bad_data_is_refused_before_weights(tiny_folder, tmp_path, forbid_weights, content):
    file = tmp_path / "train.jsonl"
    if content is not None:
        file.write_text(content)
    task = TaskConfig(name="jsonl", train=str(file), test=str(file))
    with pytest.raises(DataError, match=r"train\.jsonl"):
        train_one(train_config(tiny_folder, tmp_path / "run", task=task))
    assert not (tmp_path / "run").exists()


def test_a_missing_model_is_refused_before_weights(tmp_path, forbid_weights):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(ModelError, match=folder.name):
            train_one(train_config(folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize(
    ("adapter", "match"),
    [
        (AdapterConfig(method="sorsa", rank=17), "exceeds the 16 singular values"),
        (
            AdapterConfig(method="prolora", rank=8, prolora=ProloraConfig(unshared_rank=4)),
            "below the 4 unshared ranks",
        ),
        (AdapterConfig(method="soslora", rank=8), "would leave the experts uneven"),
    ],
)
def test_a_rank_the_method_cannot_have_is_refused_before_weights(
    tiny_folder, tmp_path, forbid_weights, adapter, match
):
    config = train_config(
        tiny_folder, tmp_path / "run", adapter=adapter, space=wide_space(tmp_path)
    )
    with pytest.raises(ConfigError, match=match):
        train_one(config)
    assert not (tmp_path / "run").exists()


def wide_space(folder) -> str:
    """Ranks as fractions, so that any max_rank binds."""
    declared = tiny.space_dict()
    for group in declared["groups"].values():
        if group["dim"] == "rank":
            group["choices"] = [1.0, 0.25]
    return space_file(folder, declared)


# Regularisers


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


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_output_side_factors_learn_at_their_own_rate(tiny_folder, tmp_path, ratio):
    """After one step of Adam every entry has moved by its learning rate."""
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
