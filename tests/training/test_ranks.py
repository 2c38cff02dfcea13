"""Ranks are elastic or whole: by what was asked for, and by what training cuts."""

import pytest

from elastic.config import AdapterConfig, StageConfig, TrainConfig
from elastic.errors import ConfigError
from elastic.supernet.discovery import declared_for, space_for
from elastic.supernet.store import load_run
from elastic.training.one_task import train_one
from tests.helpers.tiny_runs import RANK, train_config

OPEN = [StageConfig(train_dims=["rank"]), StageConfig(train_dims=["rank", "width"])]


@pytest.mark.parametrize(
    ("settings", "dims"),
    [
        ({}, {"width"}),
        ({"stages": [StageConfig(epochs=3)]}, {"width"}),
        ({"stages": OPEN}, {"rank", "width"}),
        ({"ranks": "elastic"}, {"rank", "width"}),
        ({"sampling": "lonas"}, {"rank", "width"}),
        ({"sampling": "lonas", "ranks": "whole"}, {"width"}),
        ({"adapter": AdapterConfig(taken_from="somewhere")}, {"rank", "width"}),
        ({"space": "llama-qv"}, {"rank"}),
    ],
)
def test_ranks_are_elastic_where_training_cuts_them(settings, dims):
    """What costs nothing once merged is cut on request alone; the adapted layers are the same."""
    config = TrainConfig(**{"space": "llama", **settings})
    [section], [declared] = space_for(config).sections, declared_for(config).sections
    assert {spec.dim for spec in section.groups} == dims
    assert section.adapt == declared.adapt


def test_ranks_that_cannot_stay_whole_are_refused():
    with pytest.raises(ConfigError, match="ranks whole: no stage can open rank"):
        TrainConfig(stages=OPEN, ranks="whole")
    with pytest.raises(ConfigError, match=r"llama-qv\.yaml has nothing but ranks"):
        space_for(TrainConfig(space="llama-qv", ranks="whole"))


def test_whole_ranks_learn_in_every_step(tiny_folder, tmp_path):
    """Whatever is active has all of them; a width that is cut has no others."""
    config = train_config(tiny_folder, tmp_path / "run", space="llama", stages=[])
    run = train_one(config)
    net = load_run(run)[2]
    assert {group.dim for group in net.space} == {"width"}
    for name in ("maximal", "minimal"):
        net.activate(net.space.named(name))
        assert {net.layer(site).size.rank for site, _ in net.adapters()} == {RANK}


def test_a_run_with_elastic_ranks_is_continued_by_the_same_settings(tiny_folder, tmp_path):
    """Of an earlier version, say, where nothing else was known."""
    settings = dict(space="llama", stages=[])
    train_one(train_config(tiny_folder, tmp_path / "run", ranks="elastic", **settings))
    more = train_config(
        tiny_folder, tmp_path / "more", start_from=str(tmp_path / "run"), **settings
    )
    assert {group.dim for group in load_run(train_one(more))[2].space} == {"rank", "width"}
