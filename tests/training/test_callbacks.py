"""What a run shows of itself, and how it ends when its loss is no number."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from elastic import console, data, models
from elastic.config import StageConfig, TaskConfig
from elastic.data.collating import IGNORED, collate
from elastic.data.encoding import encode
from elastic.errors import ConfigError, MissingExtra, TrainingError
from elastic.run import Run
from elastic.supernet.store import load_run
from elastic.supernet.supernet import Supernet
from elastic.training import trainer
from elastic.training.callbacks import Pace, Probe
from elastic.training.one_task import train_one
from elastic.training.trainer import ElasticTrainer
from tests.helpers import tiny
from tests.helpers.tiny_runs import metrics, train_config


def test_the_pace_is_what_was_added_over_the_time():
    now = [10.0]
    pace = Pace(clock=lambda: now[0])
    pace.add(4, 100)
    pace.add(4, 60)
    now[0] = 12.0
    assert pace.read() == {"examples_per_second": 4.0, "tokens_per_second": 80.0}
    now[0] = 13.0
    assert pace.read() == {"examples_per_second": 0.0, "tokens_per_second": 0.0}


def test_a_probe_compares_three_sub_adapters_on_the_same_examples():
    net, tokenizer = tiny.supernet(heads=True), tiny.tokenizer()
    for site, _ in net.adapters():
        net.layer(site).dropout = nn.Dropout(0.5)  # which must not act
    texts = [("1 + 1 =", "2"), ("a longer sum: 20 + 22 =", "42")]
    batch = collate([encode(tokenizer, *text) for text in texts], tiny.PAD)
    probe = Probe(net, batch, every=1, seed=0)
    assert len({probe.subs[name] for name in ("maximal", "random", "minimal")}) == 3
    net.model.train()
    state = torch.get_rng_state()
    found = probe.losses(net.model)
    assert net.model.training and torch.equal(state, torch.get_rng_state())
    assert net.current == net.space.maximal()
    for name, sub in probe.subs.items():
        net.model.eval()
        with net.active(sub), torch.no_grad():
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            log_p = net.model(**inputs).logits.log_softmax(-1)
        total = count = 0
        for row, column in (batch["labels"] != IGNORED).nonzero().tolist():
            total -= float(log_p[row, column - 1, batch["labels"][row, column]])
            count += 1
        assert found[f"loss_{name}"] == pytest.approx(total / count, rel=1e-6)


def test_metrics_tell_stage_rate_pace_and_probes(tiny_folder, tmp_path):
    config = train_config(tiny_folder, tmp_path / "run", probe_steps=3, report_to=["tensorboard"])
    run = train_one(config)
    found = metrics(run)
    assert [row["stage"] for row in found] == [1] * 4 + [2] * 4
    probed = [row["step"] for row in found if "loss_maximal" in row]
    assert probed == [3, 6]
    for row in found:
        assert row["examples_per_second"] > 0 < row["tokens_per_second"] and row["learning_rate"]
        assert ("loss_random" in row) == ("loss_minimal" in row) == (row["step"] in probed)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "train" / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("train/loss_minimal")}
    assert logged == pytest.approx({r["step"]: r["loss_minimal"] for r in found
                                    if r["step"] in probed})  # fmt: skip
    assert len(events.Scalars("train/loss")) == 8


def test_an_unknown_tracker_is_refused_before_weights_load(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(models.loading, "load", lambda *_: pytest.fail("weights were loaded"))
    config = train_config(tiny_folder, tmp_path / "run", report_to=["tensorbord"])
    with pytest.raises(ConfigError, match=r"tensorbord.*did you mean 'tensorboard'"):
        train_one(config)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"elastic-adapters\[wandb\]"):
        train_one(replace(config, report_to=["wandb"]))
    assert not (tmp_path / "run").exists()


def test_no_probe_when_it_is_off(tiny_folder, tmp_path):
    run = train_one(train_config(tiny_folder, tmp_path / "run", probe_steps=0))
    assert not any("loss_maximal" in row for row in metrics(run))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_no_number_ends_the_run(tiny_folder, tmp_path, monkeypatch, accumulation):
    """Step, sub-adapter and examples are named; the checkpoint before it resumes the run."""
    config = train_config(
        tiny_folder, tmp_path / "run", accumulation=accumulation,
        batch_size=8 // accumulation, save_steps=2,
    )  # fmt: skip
    compute_loss, seen = ElasticTrainer.compute_loss, []

    def loss(self, model, inputs, *args, **kwargs):
        value = compute_loss(self, model, inputs, *args, **kwargs)
        if self.state.global_step == 5 and self._micro_batch[1] == accumulation:
            seen.append((self.net.current, inputs["input_ids"]))
            return value * math.nan
        return value

    with monkeypatch.context() as patch:
        patch.setattr(ElasticTrainer, "compute_loss", loss)
        with pytest.raises(TrainingError) as caught:
            train_one(config)
    assert not console._BOARD.steps  # though the traceback is still held
    run = Run(config.run)
    message = str(caught.value)
    assert "step 6, stage 2" in message and "nan" in message
    assert "the checkpoint of step 4" in message
    about = json.loads((run.path / "train" / "failed.json").read_text())
    [(sub, ids)] = seen
    assert about["sub_adapter"] == sub.as_dict() and about["step"] == 6
    task = data.load_task(config.task, config.seed)
    chosen = [task.train[number] for number in about["examples"]]
    encoded = [encode(tiny.tokenizer(), e.prompt, e.answer) for e in chosen]
    assert torch.equal(collate(encoded, tiny.PAD)["input_ids"], ids)
    train_one(config)  # with what caused it gone, it goes on
    assert run.super_adapter.is_dir() and len(metrics(run)) == 8


def test_factors_that_are_no_numbers_are_not_kept(tiny_folder, tmp_path, monkeypatch):
    """A gradient may be infinite under a finite loss: the step's checkpoint would be useless."""
    regularise = ElasticTrainer.regularise

    def spoilt(self):
        regularise(self)
        if self.state.global_step == 3:
            next(self.net.adapters())[1].A.grad.fill_(math.inf)

    monkeypatch.setattr(ElasticTrainer, "regularise", spoilt)
    config = train_config(tiny_folder, tmp_path / "run", save_steps=2)
    with pytest.raises(
        TrainingError, match=r"step 4, stage 1: .*not finite.*the checkpoint of step 2"
    ):
        train_one(config)


# One sub-adapter alone.


@pytest.fixture(scope="module")
def super_run(tiny_folder, tmp_path_factory):
    """Without moments: to make up for cut channels trains what belongs to them, too."""
    folder = tmp_path_factory.mktemp("super")
    config = train_config(tiny_folder, folder / "run", compensation_examples=0)
    return config, train_one(config)


def alone(config, tmp_path, **settings):
    import dataclasses

    return dataclasses.replace(
        config, run=str(tmp_path / "alone"), start_from=config.run, stages=[StageConfig()],
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_a_sub_adapter_goes_on_alone(super_run, tmp_path, monkeypatch, distill):
    config, before = super_run
    visited, teachers = [], []
    compute_loss = ElasticTrainer.compute_loss

    def loss(self, *args, **kwargs):
        visited.append(self.net.current)
        value = compute_loss(self, *args, **kwargs)
        if self._teacher is not None:
            teachers.append(self._fixed_teacher)
        return value

    monkeypatch.setattr(ElasticTrainer, "compute_loss", loss)
    run = train_one(alone(config, tmp_path, sub_adapter="minimal", distill=distill))
    _, _, net = load_run(run)
    minimal = net.space.minimal()
    assert set(visited) == {minimal} and len(visited) == 4
    assert len(teachers) == (4 if distill else 0)
    assert run.resolve("best", net.space) == ("specialised", minimal)
    # Its own part has moved, nothing else has.
    old, new = (load_file(r.super_adapter / "factors.safetensors") for r in (before, run))
    moved = 0
    for site, _ in net.adapters():
        with net.active(minimal):
            layer = net.layer(site)
            rank, rows, columns = layer.size.rank, layer.size.rows, layer.size.columns
        for name, own in (("A", (slice(rank), slice(columns))), ("B", (slice(rows), slice(rank)))):
            changed = old[f"{site}.{name}"] != new[f"{site}.{name}"]
            moved += int(changed[own].sum())
            changed[own] = False
            assert not changed.any(), site
    assert moved > 100


def test_the_teacher_is_the_maximal_of_before(super_run, tmp_path):
    _, before = super_run
    _, _, net = load_run(before)
    teacher = trainer.frozen(net)
    ids = tiny.tokens()
    expected = tiny.logits(net.model, ids)
    tiny.randomize_(net)
    net.activate(net.space.minimal())
    assert not torch.equal(tiny.logits(net.model, ids), expected)
    assert torch.equal(tiny.logits(teacher, ids), expected)
    assert teacher.get_input_embeddings().weight is net.model.get_input_embeddings().weight
    assert isinstance(net, Supernet) and not any(p.requires_grad for p in teacher.parameters())


def test_nothing_is_left_to_search(super_run, tmp_path):
    from elastic.config import SearchConfig
    from elastic.errors import RunError
    from elastic.searching.study import search

    config, _ = super_run
    run = train_one(alone(config, tmp_path, sub_adapter="heuristic"))
    with pytest.raises(RunError, match="one sub-adapter alone"):
        search(SearchConfig(run=str(run.path)))


def test_from_takes_over_the_settings_of_a_run(super_run, tmp_path):
    from elastic.config import TrainConfig
    from elastic.config.parsing import parse

    config, before = super_run
    arguments = ["--from", str(before.path), "--sub_adapter", "minimal", "--distill", "0.5"]
    found = parse(TrainConfig, arguments)
    assert found.start_from == str(before.path) and found.run == f"{before.path}-minimal"
    assert (found.task, found.adapter, found.stages) == (config.task, config.adapter, config.stages)
    assert parse(TrainConfig, [*arguments, "--run", "elsewhere"]).run == "elsewhere"
    assert found.task == TaskConfig(train_examples=32, validation_examples=8, test_examples=8)
