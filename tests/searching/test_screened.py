"""A search tries every choice alone whatever the model, the space and the precisions; and goes on
where a worker that did so was killed."""

import json
import os
import signal
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import yaml

from elastic.config import StudyConfig
from elastic.searching import screening, study
from elastic.searching.objective import Objective
from elastic.searching.study import search
from elastic.spaces.candidates import CandidateSpace
from elastic.supernet.compact import compact
from elastic.supernet.examples import task_of
from elastic.supernet.held_out import HeldOut
from elastic.supernet.store import load_run
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.children import ended, forked
from tests.helpers.classification import classifier_config
from tests.helpers.searches import GRAPH, choices_task, config, front_of, trained_run, trials_of
from tests.helpers.seq2seq import SPACE
from tests.helpers.tiny_runs import ONE_ROUND, copy_run, randomize_factors, train_config

pytestmark = pytest.mark.usefixtures("fake_latency")


def plain(folder):
    return trained_run(tiny.save_tiny(folder / "base"), folder)


def with_group(name, group, **overrides):
    def made(folder):
        declared = tiny.space_dict()
        declared["groups"][name] = group
        return trained_run(tiny.save_tiny(folder / "base", **overrides), folder, declared)

    return made


def classifier(folder):
    task = {"second": "{other}", "validation_examples": 16}
    return moved(classifier_config(folder, task=task))


def encoder_decoder(folder):
    base, space = tiny.save_t5(folder / "base"), folder / "space.yaml"
    space.write_text(yaml.safe_dump(SPACE))
    return moved(train_config(base, folder / "run", space=str(space), task=choices_task(folder)))


def moved(settings):
    run = train_one(settings)
    randomize_factors(run)
    return run


CASES = {
    "compressed": (plain, {"compress": ["int8", "int4"], "timing": GRAPH}),
    "depth": (with_group("depth", {"dim": "depth", "choices": [4, 3, 2]}, num_hidden_layers=4), {}),
    "vocabulary": (with_group("vocab", {"dim": "vocab", "choices": [1.0, 0.6, 0.4]}), {}),
    "classifier": (classifier, {"timing": replace(ONE_ROUND, new_tokens=0)}),
    "encoder-decoder": (encoder_decoder, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_search_believes_what_choices_alone_diverge(case, tmp_path, request):
    make, settings = CASES[case]
    if "compress" in settings:
        request.getfixturevalue("fake_graphs")
    run = make(tmp_path)
    wanted = config(run, trials=12, screen=8, **settings)
    search(wanted)
    told = json.loads((run.search / "about.json").read_text())["foresight"]
    assert told["n"] == 6 and told["r2"] <= 1 and -1 <= told["rank_correlation"] <= 1
    kept = study._open_study(run, wanted)[0].user_attrs
    assert "importance" not in kept and screening.parts(kept["screened"]) is not None

    _, base, net = load_run(run)
    held_out = HeldOut.of(run, net, base.tokenizer, task_of(run), wanted.compensation)
    objective = Objective(net, base.tokenizer, [], wanted, {}, held_out)

    def directly(candidate) -> float:
        model = objective.rounded(compact(net, candidate.sub_adapter), candidate)
        return held_out.divergence(model, 8)

    space = CandidateSpace.of(net.space, wanted.compress)
    alone = screening.screen(space, directly, quiet=True)[screening.ALONE]
    for mine, theirs in zip(alone, kept["screened"][screening.ALONE], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-2, abs=1e-5)
    ranks = [np.argsort(np.concatenate([*each])) for each in (alone, kept["screened"]["alone"])]
    assert (ranks[0] == ranks[1]).mean() > 0.9  # those that are nearly equal may change places


def test_another_worker_goes_on_where_one_was_killed(trained, tmp_path, monkeypatch):
    whole, run = (copy_run(trained, tmp_path / name / "run") for name in ("whole", "killed"))
    settings = dict(trials=5, screen=8, study=StudyConfig(name="shared"))
    asked, ask, killed_at = tmp_path / "asked", Objective.divergence, 4

    def told(self, candidate, rows):
        with asked.open("a") as file:
            file.write(json.dumps([os.getpid(), str(candidate)]) + "\n")
        return ask(self, candidate, rows)

    def doomed(self, candidate, rows):
        if asked.is_file() and len(asked.read_text().splitlines()) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return told(self, candidate, rows)

    def first():
        monkeypatch.setattr(Objective, "divergence", doomed)
        search(config(run, **settings))

    def second():
        while not asked.is_file():
            time.sleep(0.01)
        search(config(run, **settings))

    monkeypatch.setattr(Objective, "divergence", told)
    assert [ended(child) for child in [forked(first), forked(second)]] == [-signal.SIGKILL, 0]
    lines = [json.loads(line) for line in asked.read_text().splitlines()]
    by = Counter(process for process, _ in lines)
    assert sorted(by.values())[0] == killed_at and len(by) == 2
    assert len(lines) == len({candidate for _, candidate in lines})  # none was asked again
    monkeypatch.setattr(Objective, "divergence", ask)
    search(config(whole, **settings))
    assert trials_of(run) == trials_of(whole) and front_of(run) == front_of(whole)


def test_every_choice_is_tried_alone_once_for_a_study(trained, tmp_path, monkeypatch):
    asked = []
    ask = Objective.divergence

    def spied(self, candidate, rows):
        asked.append(rows)
        return ask(self, candidate, rows)

    monkeypatch.setattr(Objective, "divergence", spied)
    run = copy_run(trained, tmp_path / "run")
    search(config(run, trials=4, screen=7))
    asked_once = screening.count(load_run(run)[2].space)
    assert asked == [7] * asked_once
    search(config(run, trials=12, screen=7))
    assert len(asked) == asked_once
    told = json.loads((run.search / "about.json").read_text())["foresight"]
    assert told["n"] == 12 - 6 and told["r2"] <= 1


@pytest.mark.parametrize("killed_at", [1, 4])
def test_a_killed_screening_goes_on(trained, tmp_path, monkeypatch, capsys, killed_at):
    whole, run = (copy_run(trained, tmp_path / name / "run") for name in ("whole", "killed"))
    settings = dict(trials=5, screen=8)
    search(config(whole, **settings))
    asked, ask = [], Objective.divergence

    def killed(self, candidate, rows):
        asked.append(candidate)
        if len(asked) == killed_at:
            raise KeyboardInterrupt
        return ask(self, candidate, rows)

    monkeypatch.setattr(Objective, "divergence", killed)
    with pytest.raises(KeyboardInterrupt):
        search(config(run, **settings))
    assert len(asked) == killed_at
    search(config(run, **settings))
    assert asked[killed_at] == asked[killed_at - 1]  # the one that was not answered
    assert len(asked) == len(set(asked)) + 1 == screening.count(load_run(run)[2].space) + 1
    said = f"choices alone, of which {killed_at - 1} were tried before"
    assert (said in " ".join(capsys.readouterr().err.split())) == (killed_at > 1)
    assert trials_of(run) == trials_of(whole) and front_of(run) == front_of(whole)


def test_divergences_of_another_study_are_not_believed(trained, tmp_path, monkeypatch):
    """Its settings, of which they are, may be others."""
    asked, ask = [], Objective.divergence

    def spied(self, candidate, rows):
        asked.append(rows)
        return ask(self, candidate, rows)

    monkeypatch.setattr(Objective, "divergence", spied)
    run = copy_run(trained, tmp_path / "run")
    for name, screen in (("one", 8), ("two", 8), ("three", 7)):
        search(config(run, trials=2, screen=screen, study=StudyConfig(name=name)))
    assert [asked.count(rows) for rows in (8, 7)] == [2 * len(asked) / 3, len(asked) / 3]


def test_without_screening_gradients_are_asked(trained, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Objective, "divergence", lambda *given: asked.append(given))
    run = copy_run(trained, tmp_path / "run")
    search(config(run, trials=4, screen=0))
    assert not asked
    told = (run.search / "study.journal").read_text()
    assert '"importance"' in told and '"screened"' not in told
