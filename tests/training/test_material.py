"""A run is known by its data: what it began with is told from anything else, wherever it is now."""

import json
import shutil
from dataclasses import replace

import pytest
import yaml

from elastic.__main__ import main
from elastic.config import TaskConfig
from elastic.data.digest import of_texts
from elastic.data.task import Example, Task
from elastic.errors import BaseMismatch, DataError, DataMissing, ModelError, RunError
from elastic.models import loading
from elastic.run import Run
from elastic.supernet.examples import task_of
from elastic.supernet.store import load_run
from elastic.training.material import Material
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.tiny_runs import interrupted, train_config


def write(folder, *, train: int = 24, answer: str = "a") -> TaskConfig:
    folder.mkdir(exist_ok=True)
    for split, count in (("train", train), ("validation", 8), ("test", 8)):
        rows = ({"q": f"{split} {n}", "a": f"{answer}{n}"} for n in range(count))
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return TaskConfig(name="jsonl", prompt="{q}", answer="a", **files)


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    config = train_config(tiny_folder, folder / "run", task=write(folder / "data"), max_steps=1)
    train_one(config)
    return folder, config


@pytest.fixture
def run(finished, tmp_path):
    """A copy with data of its own, and its settings."""
    folder, config = finished
    shutil.copytree(folder / "run", tmp_path / "run")
    config = replace(config, run=str(tmp_path / "run"), task=write(tmp_path / "data"))
    Run(config.run).move(config)
    return Run(config.run), config


def with_base(config, folder):
    return replace(config, model=replace(config.model, path=str(folder)))


def test_a_corrected_file_is_not_what_was_trained(run, tmp_path, forbid_weights):
    run, config = run
    assert train_one(config).path == run.path
    before = run.config_file.read_bytes()
    write(tmp_path / "data", answer="b")
    for use in (lambda: train_one(config), lambda: task_of(run)):
        with pytest.raises(RunError, match=r"the train examples of .*train\.jsonl \(24 others\)"):
            use()
    write(tmp_path / "data", train=25)
    with pytest.raises(RunError, match=r"train examples of .*\(24 then, 25 now\)") as caught:
        train_one(config)
    assert "validation" not in str(caught.value)
    assert run.config_file.read_bytes() == before


def test_a_killed_run_does_not_go_on_with_other_data(tiny_folder, tmp_path, monkeypatch):
    config = train_config(tiny_folder, tmp_path / "run", task=write(tmp_path / "data"))
    interrupted(config, monkeypatch, 2)
    write(tmp_path / "data", train=30)
    with pytest.raises(RunError, match="began with other data: the train examples"):
        train_one(config)
    write(tmp_path / "data")
    train_one(config)


def test_data_may_move(run, tmp_path, forbid_weights, capsys):
    run, config = run
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    with pytest.raises(DataMissing):
        task_of(run)
    assert main(["evaluate", str(run.path)]) == 1
    said = capsys.readouterr().err
    told = f"elastic train --config {run.config_file} --run {run.path} --task.test NEW"
    assert f"test.jsonl: no such data file; if it has moved: {told}" in said
    moved = replace(config, task=write(tmp_path / "elsewhere"))
    train_one(moved)
    assert Run(config.run).config().task.train == moved.task.train
    assert len(task_of(run).train) == 24
    other = replace(config, task=write(tmp_path / "other", answer="b"))
    with pytest.raises(RunError, match="began with other data"):
        train_one(other)
    assert run.config().task == moved.task


def test_a_base_may_move(run, tiny_folder, tmp_path, forbid_weights):
    run, config = run
    shutil.copytree(tiny_folder, tmp_path / "base")
    moved = with_base(config, tmp_path / "base")
    train_one(moved)
    assert run.config().model.path == str(tmp_path / "base")
    tiny.save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(BaseMismatch, match="began on a base with"):
        train_one(with_base(config, tmp_path / "other"))
    assert run.config().model.path == str(tmp_path / "base")


def test_another_setting_is_another_run_wherever_its_data_are(run, tmp_path):
    run, config = run
    moved = write(tmp_path / "elsewhere")
    for name, value in (("answer", "q"), ("draw", "position")):
        with pytest.raises(RunError, match=rf"holds another run, which differs in task\.{name}"):
            train_one(replace(config, task=replace(moved, **{name: value})))


def test_another_tokenizer_is_told(run, tiny_folder, tmp_path):
    run, config = run
    shutil.copytree(tiny_folder, tmp_path / "base")
    words = tiny.tokenizer()
    words.add_special_tokens({"unk_token": "<pad>"})
    words.save_pretrained(tmp_path / "base")
    run.move(with_base(config, tmp_path / "base"))
    with pytest.raises(RunError, match="other data: the vocabulary of the tokenizer"):
        load_run(run)


def test_a_run_of_an_earlier_version_goes_on(run, tmp_path, forbid_weights):
    """It has no digest, its rows are by position, and its templates have no escapes."""
    run, config = run
    run.data.unlink()
    settings = yaml.safe_load(run.config_file.read_text())
    del settings["task"]["draw"], settings["task"]["cutoff"]
    settings["task"]["prompt"] = r"{q}\n"
    run.config_file.write_text(yaml.safe_dump(settings))
    task = run.config().task
    assert (task.draw, task.prompt) == ("position", r"{q}\\n")
    first = task_of(run).train[0]
    assert (first.prompt, first.where.rpartition(":")[2]) == (r"train 0\n", "1")
    same = replace(config.task, prompt=r"{q}\n")
    write(tmp_path / "data", train=30)
    assert train_one(replace(config, task=same)).path == run.path


# Before weights


def spoilt(tiny_folder, folder, **special):
    shutil.copytree(tiny_folder, folder)
    words = tiny.tokenizer()
    words.add_special_tokens(special)
    words.save_pretrained(folder)
    return folder


def test_padding_beyond_the_embedding_is_named(tiny_folder, tmp_path, forbid_weights):
    base = spoilt(tiny_folder, tmp_path / "base", pad_token="<new>")
    config = train_config(base, tmp_path / "run", task=write(tmp_path / "data"))
    with pytest.raises(ModelError, match=rf"pads with '<new>', token {tiny.VOCABULARY}, and the"):
        train_one(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_split_is_encoded_before_weights_load(tiny_folder, tmp_path, forbid_weights, split):
    base = spoilt(tiny_folder, tmp_path / "base", unk_token="<new>")
    task = write(tmp_path / "data")
    with open(tmp_path / "data" / f"{split}.jsonl", "a") as file:
        file.write('\n{"q": "odd <new>", "a": "b"}')
    with pytest.raises(DataError, match=rf"{split}\.jsonl:\d+: token \d+ of the tokenizer"):
        train_one(train_config(base, tmp_path / "run", task=task))
    assert not (tmp_path / "run").exists()


def test_what_will_be_trained_is_shown(tiny_folder, tmp_path, capsys):
    task = write(tmp_path / "data")
    with open(tmp_path / "data" / "train.jsonl", "a") as file:
        file.write('\n{"q": "' + "long " * 40 + '", "a": "b"}')
    config = train_config(tiny_folder, tmp_path / "run", task=task)
    skeleton = loading.skeleton(config.model)
    material = Material.of(config, skeleton)
    material.tell(skeleton)
    said = capsys.readouterr().err
    first = material.task.train[0]
    assert f"  | <bos>{first.prompt} {first.answer}<eos>" in said
    assert "train.jsonl:25) has 204 tokens, half have 14 at most" in said
    assert "Examples:" not in said


def test_a_digest_ignores_what_later_versions_add():
    """Only what an example says: fields at their defaults, and where it stands, are left out."""
    one = Task([Example("a", "b", where="x:1")], [], [])
    assert of_texts(one) == of_texts(Task([Example("a", "b", where="y:7")], [], []))
    assert of_texts(one) != of_texts(Task([Example("a", "b", options=("b", "c"))], [], []))
