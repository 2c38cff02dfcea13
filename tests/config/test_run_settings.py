"""A run directory is known by its settings, and says what it cannot be used for."""

import json
from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from elastic.config import (
    AdapterConfig,
    ScheduleConfig,
    StageConfig,
    TaskConfig,
    TrainConfig,
)
from elastic.config.parsing import parse
from elastic.errors import RunError
from elastic.run import Chosen, Run
from elastic.spaces.bound import Candidate, SubAdapter

CONFIGS = st.builds(
    TrainConfig,
    seed=st.integers(0, 2**31),
    adapter=st.builds(
        AdapterConfig, rank=st.integers(1, 64), alpha=st.floats(1e-3, 1e3), dropout=st.just(0.1)
    ),
    lr=st.builds(ScheduleConfig, base_lr=st.floats(1e-8, 1.0), warmup_epochs=st.floats(0, 2)),
    stages=st.sampled_from(
        [
            [StageConfig(init_lr=3e-5, warmup_steps=2)],
            [StageConfig(), StageConfig(train_dims=["rank"], width_indicator=2, epochs=3)],
        ]
    ),
    task=st.just(TaskConfig(name="jsonl", train="a: b.jsonl", test="yes", prompt="{q}\n#Δ: ")),
)


@settings(max_examples=4, phases=[Phase.generate])  # shrinking would parse for minutes
@given(CONFIGS)
def test_the_resolved_settings_come_back_from_the_run(tmp_path_factory, config):
    run = Run(tmp_path_factory.mktemp("runs") / "mine")
    assert run.claim(config) is False
    run.begin(config)
    assert run.claim(config) is False  # begun, not finished
    assert parse(TrainConfig, ["--config", str(run.config_file)]) == config
    with pytest.raises(RunError, match=r"has no trained super-adapter; run: elastic train"):
        run.config()
    run.super_adapter.mkdir()
    assert run.claim(config) is True
    assert run.config() == config
    assert run.claim(replace(config, run="elsewhere")) is True, "a run may be moved"


def test_another_configuration_is_refused_by_setting(tmp_path):
    run = Run(tmp_path / "mine")
    config = TrainConfig()
    run.begin(config)
    before = run.config_file.read_bytes()
    for other, message in [
        (replace(config, seed=1), r"differs in seed \(0 there, 1 here\)"),
        (replace(config, adapter=AdapterConfig(rank=8)),
         r"differs in adapter\.rank \(32 there, 8 here\)"),
        (replace(config, stages=[StageConfig()]), "differs in stages"),
    ]:  # fmt: skip
        with pytest.raises(RunError, match=message):
            run.claim(other)
        assert run.config_file.read_bytes() == before
    run.begin(replace(config, seed=1))
    assert run.config_file.read_bytes() == before, "beginning again must not rewrite"


def test_stages_given_as_a_tuple_are_the_same_run(tmp_path):
    run = Run(tmp_path / "mine")
    config = TrainConfig(stages=(StageConfig(), StageConfig()))
    run.begin(config)
    assert run.claim(config) is False


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(RunError, match="is not empty and not a run"):
        Run(tmp_path).claim(TrainConfig())
    with pytest.raises(RunError, match="not a run"):
        Run(tmp_path / "thesis.txt").claim(TrainConfig())
    (tmp_path / "empty").mkdir()
    assert Run(tmp_path / "empty").claim(TrainConfig()) is False


@pytest.mark.parametrize("text", ["a: [", "- 1", ""])
def test_a_broken_config_file_is_named(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "super_adapter").mkdir()
    run = Run(tmp_path)
    for use in (run.config, lambda: run.claim(TrainConfig())):
        with pytest.raises(RunError, match=r"config\.yaml"):
            use()


def test_a_run_that_is_not_there_says_how_to_make_one(tmp_path):
    with pytest.raises(RunError, match=r"does not exist; run: elastic train"):
        Run(tmp_path / "none").config()


def test_names_of_sub_adapters(tmp_path):
    from tests.helpers import tiny

    space = tiny.space().bind(tiny.llama(), tiny.RANK)
    run = Run(tmp_path)
    assert run.resolve("minimal", space) == ("minimal", space.minimal())
    with pytest.raises(RunError, match="no search result yet; run: elastic search"):
        run.resolve("best", space)
    run.sub_adapters.mkdir(parents=True)
    (run.sub_adapters / "best.json").write_text(str(space.heuristic()))
    assert run.resolve("best", space) == ("best", space.heuristic())
    mine = tmp_path / "mine.json"
    mine.write_text(str(space.uniform(0.5)))
    assert run.resolve(str(mine), space) == ("mine", space.uniform(0.5))
    with pytest.raises(RunError, match="unknown sub-adapter 'maximall'; did you mean 'maximal'"):
        run.resolve("maximall", space)


def test_what_a_search_says_of_its_own_is_believed_of_no_other_file(tmp_path):
    run, candidate = Run(tmp_path), Candidate(SubAdapter((("group", 8),)), "int8")
    run.sub_adapters.mkdir(parents=True)
    saved = {"accuracy": 0.5, **candidate.as_dict()}
    ours, copied = run.sub_adapters / "best.json", tmp_path / "copied.json"
    for file in (ours, copied):
        file.write_text(json.dumps(saved))
    for name in ("best", str(ours)):
        nothing = {"degree": 0.0, "held_out_losses": {}}  # an earlier version made up for nothing
        assert run.chosen(name) == Chosen("best", candidate, saved, nothing)
    assert run.chosen(str(copied)) == Chosen("copied", candidate)
    half = {"degree": 0.5, "sequential": True, "held_out_losses": {"0.5": 1.0}}
    for file in (ours, copied):
        file.write_text(json.dumps({**saved, "compensation": half}))
        assert run.chosen(str(file)).compensation == half
    assert run.chosen("minimal") == Chosen("minimal") and run.chosen("minimal").compress is None
