"""`elastic search --recover`: the front is trained on, each at its own size, and ranked again."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from elastic.config import CompensationConfig, EvaluateConfig, RecoveryConfig
from elastic.errors import TrainingError
from elastic.evaluation.command import evaluate_run
from elastic.files import lock, read_json
from elastic.recovery import recover
from elastic.recovery.command import search
from elastic.run import Run
from elastic.searching.study import search as plain_search
from elastic.supernet.store import load_run
from elastic.training.trainer import ElasticTrainer
from tests.helpers import searches, tiny
from tests.helpers.tiny_runs import copy_run

pytestmark = pytest.mark.usefixtures("fake_latency")

STEPS = RecoveryConfig(steps=3, base_lr=5e-3)


def wanted(run, recovery=STEPS, **overrides):
    made_up = CompensationConfig(sequential=False)  # fitted ones: test_export.py
    settings = dict(trials=6, test_front=2, recover=recovery, compensation=made_up)
    return searches.config(run, **(settings | overrides))


@pytest.fixture(scope="module")
def searched(trained, fake_latency, tmp_path_factory):
    """(run, its front): what the same command without --recover leaves."""
    run = copy_run(trained, tmp_path_factory.mktemp("searched") / "run")
    return run, plain_search(replace(wanted(run), recover=RecoveryConfig()))


@pytest.fixture(scope="module")
def recovered(searched, tmp_path_factory):
    """(run, its front before, its front after)."""
    run = copy_run(searched[0], tmp_path_factory.mktemp("recovered") / "run")
    return run, searched[1], search(wanted(run))


def test_each_is_shown_before_and_after(recovered):
    run, before, after = recovered
    entries = searches.front_of(run)
    assert [one["name"] for one in entries] == [one.name for one in before.members]
    assert any(one["recovery"]["taken"] for one in entries)
    for entry, old in zip(entries, before.members, strict=True):
        recovery = entry["recovery"]
        assert recovery["steps"] == 3 and recovery["base_lr"] == 5e-3
        assert recovery["before"]["accuracy"] == old.test["accuracy"]
        assert recovery["before"]["compensation"] == old.test["compensation"]
        lower = recovery["after"]["held_out_loss"] < recovery["before"]["held_out_loss"]
        assert recovery["taken"] == lower
        now = recovery["after" if lower else "before"]
        for name in ("accuracy", "accuracy_interval", "validation_accuracy", "compensation"):
            assert entry[name] == now[name], name
    assert len({str(one["recovery"]["maximal"]) for one in entries}) == 1
    maximal = entries[0]["recovery"]["maximal"]
    assert maximal["before"]["held_out_loss"] != maximal["after"]["held_out_loss"]
    page = searches.data_of(run)["members"]
    assert [one["before"] for one in page] == [
        one["recovery"]["before"]["accuracy"] for one in entries
    ]
    assert sum(member.best for member in after.members) == 1
    assert read_json(run.sub_adapters / "best.json")["name"] == after.best.name


def test_a_name_of_the_front_means_it_as_recovered(recovered):
    run, _, after = recovered
    member = next(one for one in after.members if one.recovery["taken"])
    found = evaluate_run(EvaluateConfig(run=str(run.path), sub_adapter=member.name, split="test"))
    assert found.score.accuracy == member.test["accuracy"]
    mine = Run(run.recovered / member.recovery["folder"])
    _, _, its_own = load_run(mine)
    _, _, net = load_run(run, chosen=run.chosen(member.name))
    _, _, original = load_run(run)
    logits = []
    for each in (net, its_own, original):
        with each.active(member.sub_adapter, member.made_up.degree) as model:
            logits.append(tiny.logits(model, tiny.tokens()))
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    # Nothing that is known twice takes room twice.
    assert (mine.super_adapter / "moments.safetensors").samefile(
        run.super_adapter / "moments.safetensors"
    )


def test_heads_that_lack_tokens_are_recovered(tmp_path):
    declared = tiny.space_dict()
    declared["groups"]["vocab"] = {"dim": "vocab", "choices": [1.0, 0.6, 0.4]}
    run = searches.trained_run(tiny.save_tiny(tmp_path / "base"), tmp_path, declared)
    front = search(wanted(run, trials=4, screen=0))
    taken = [one for one in front.members if one.recovery["taken"] and one.sayable]
    assert taken and all("vocabulary" in entry for entry in searches.front_of(run))
    found = evaluate_run(EvaluateConfig(run=str(run.path), sub_adapter="front-1", split="test"))
    assert found.score.accuracy == front.members[0].test["accuracy"]


def test_the_same_command_again_trains_and_scores_nothing(recovered, monkeypatch):
    run, _, _ = recovered
    before = searches.front_of(run)
    monkeypatch.setattr(recover, "_train", None)
    monkeypatch.setattr(recover, "evaluate", None)
    search(wanted(run))
    assert searches.front_of(run) == before


def test_a_second_command_waits_and_says_so(recovered, monkeypatch):
    run, _, _ = recovered
    said: list[str] = []
    with ExitStack() as first:
        assert first.enter_context(lock(run.recovered))

        def say(text: str) -> None:
            said.append(text)
            first.close()  # the first one ends

        monkeypatch.setattr("elastic.run.say", say)
        search(wanted(run))
    who = f"process {os.getpid()}"
    assert said == [f"{run.recovered}: waiting for {who}, which recovers sub-adapters"]


def test_an_interrupted_recovery_goes_on(recovered, trained, tmp_path, monkeypatch):
    run = copy_run(trained, tmp_path / "run")
    steps, training_step = [], ElasticTrainer.training_step

    def stopped(self, *args, **kwargs):
        if len(steps) == 4:  # in the second step of the second one
            raise KeyboardInterrupt
        steps.append(self.state.global_step)
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ElasticTrainer, "training_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            search(wanted(run))
    assert steps == [0, 1, 2, 0]
    del steps[:]

    def counted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(ElasticTrainer, "training_step", counted)
    front = search(wanted(run))
    assert steps == [1, 2] + [0, 1, 2] * (len(front.members) - 1)  # and the maximal one's
    whole = searches.front_of(recovered[0])
    assert searches.front_of(run) == whole


def test_small_ones_are_taught_and_the_maximal_one_is_not(searched, tmp_path, monkeypatch):
    run = copy_run(searched[0], tmp_path / "run")
    seen = {}
    compute_loss = ElasticTrainer.compute_loss

    def loss(self, *args, **kwargs):
        value = compute_loss(self, *args, **kwargs)
        seen[self.net.current] = (self.config.distill, self._teacher is not None)
        return value

    monkeypatch.setattr(ElasticTrainer, "compute_loss", loss)
    front = search(wanted(run, replace(STEPS, distill=0.7)))
    taught = {one.sub_adapter: (0.7, True) for one in front.members}
    maximal = load_run(run)[2].space.maximal()
    assert seen == taught | {maximal: (0.0, False)} | {
        one: told for one, told in taught.items() if one != maximal
    }


def test_what_fails_is_named_and_cleared_away_later(recovered, searched, tmp_path):
    run = copy_run(searched[0], tmp_path / "run")
    with pytest.raises(TrainingError, match=r"front-1: step 2, .*recover\.base_lr"):
        search(wanted(run, RecoveryConfig(steps=2, base_lr=1e30)))
    assert "recovery" not in searches.front_of(run)[0]
    search(wanted(run))
    kept = {path.name.partition(".")[0] for path in run.recovered.iterdir()}
    assert kept == {path.name.partition(".")[0] for path in recovered[0].recovered.iterdir()}


def test_what_gets_worse_is_left_as_it_was(searched, tmp_path, rising_losses):
    run = copy_run(searched[0], tmp_path / "run")
    plain = searched[1]
    scores = [{k: v for k, v in one.as_dict().items() if k != "best"} for one in plain.members]
    front = search(wanted(run))
    assert not any(one.recovery["taken"] for one in front.members)
    again = [
        {k: v for k, v in one.as_dict().items() if k not in ("best", "recovery")}
        for one in front.members
    ]
    assert again == scores
    name = front.members[0].name
    assert run.factors_of(run.chosen(name)) == run.super_adapter
