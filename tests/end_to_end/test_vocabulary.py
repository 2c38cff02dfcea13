"""A run whose head may know some tokens alone: trained, searched, and written in every format."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, pipeline

import elastic
from elastic.config import EvaluateConfig, HfConfig, StageConfig, VocabConfig
from elastic.data.vocabulary import Sayable
from elastic.errors import ConfigError
from elastic.evaluation.command import evaluate_run
from elastic.exporting.command import export
from elastic.exporting.targets import FORMATS
from elastic.formats import onnx, openvino
from elastic.run import Run
from elastic.searching.page import write_page
from elastic.searching.study import search
from elastic.spaces.bound import SubAdapter
from elastic.supernet.store import load_run
from elastic.training.dry_run import estimate
from elastic.training.one_task import train_one
from tests.helpers import exports, searches, tiny
from tests.helpers.pipelines import NEW, ByOpenvino, by_onnxruntime, by_torch
from tests.helpers.tiny_runs import copy_run, randomize_factors, space_file, train_config

GROUP = "lm_head.vocab"
COUNTED = ["accuracy", "macs"]
"""No clock decides what is on the front: the smallest is."""
ANSWERS = 12
"""Digits, the blank before them and the end of the sequence."""


@pytest.fixture(scope="module")
def settings(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    declared = tiny.space_dict()
    declared["groups"]["vocab"] = {"dim": "vocab", "choices": [1.0, 0.5, 1]}
    return train_config(tiny_folder, folder / "run", space=space_file(folder, declared))


@pytest.fixture(scope="module")
def run(settings):
    found = train_one(settings)
    randomize_factors(found)
    return found


def sub_of(net, tokens: int) -> SubAdapter:
    return SubAdapter(tuple((net.space.maximal().as_dict() | {GROUP: tokens}).items()))


def test_the_super_adapter_keeps_the_order_and_what_has_to_stay(run, settings):
    _, base, net = load_run(run)
    assert net.space.vocabulary.choices == (tiny.VOCABULARY, 49, ANSWERS)
    kept = net.vocabulary.tokens(ANSWERS).tolist()
    assert base.tokenizer.decode(sorted(kept), skip_special_tokens=True) == " 0123456789"
    saved = yaml.safe_load((run.super_adapter / "space.yaml").read_text())
    assert saved["groups"]["vocab"]["least"] == ANSWERS
    assert train_one(settings).path == run.path  # finished


def test_a_dry_run_shows_it(settings, capsys):
    found = estimate(settings)
    [row] = [each for each in found.space if each.dim == "vocab"]
    assert row.choices == (tiny.VOCABULARY, 49, ANSWERS)
    hidden, macs = 32, found.costs
    spared = (tiny.VOCABULARY - ANSWERS) * hidden
    assert macs["maximal"].macs - macs["minimal"].macs > spared
    assert any("12 of 98 tokens stay" in note for note in found.notes)


def test_a_text_without_a_vocabulary_to_order_is_refused(tiny_folder, tmp_path):
    config = train_config(tiny_folder, tmp_path / "run", vocab=VocabConfig(text="any"))
    with pytest.raises(ConfigError, match="no group of dim vocab"):
        train_one(config)


def test_a_search_says_what_of_the_answers_can_be_said(run, capsys):
    config = searches.config(run, trials=4, objectives=COUNTED)
    search(config).show()
    shown = capsys.readouterr().out
    cut = [each for each in searches.front_of(run) if each["sub_adapter"][GROUP] < 98]
    assert cut, "a head of some tokens is smaller and no worse"
    for each in cut:
        found = Sayable(**each["vocabulary"])
        assert (found.tokens_known, found.vocabulary) == (each["sub_adapter"][GROUP], 98)
        assert (found.answers, found.unsayable) == (8, 0)
        assert f"The head of {each['name']} knows {found}" in " ".join(shown.split())


@pytest.fixture(scope="module")
def searched(run):
    """A run of its own, and a front of which one member is believed not to say two answers."""
    copied = copy_run(run, run.path.parent / "searched")
    front = search(searches.config(copied, trials=4, objectives=COUNTED))
    cut = next(member for member in front.members if member.sayable)
    said = {**cut.test["vocabulary"], "answer_tokens": 20, "answer_tokens_known": 17}
    silent = replace(cut, test={**cut.test, "vocabulary": {**said, "unsayable": 2}}, best=True)
    whole = replace(cut, test={k: v for k, v in cut.test.items() if k != "vocabulary"}, best=False,
                    candidate=front.trials[0].candidate, name="whole")  # fmt: skip
    return copied, replace(front, members=[silent, whole])


def test_the_page_tells_what_every_head_can_say(searched):
    run, front = searched
    assert front.members[1].sub_adapter[GROUP] == tiny.VOCABULARY
    write_page(front)
    data = searches.data_of(run)
    assert data["head"] == {"group": GROUP, "tokens": tiny.VOCABULARY}
    assert [each["head"] for each in data["members"]] == [
        {"share": 0.85, "answers": 8, "unsayable": 2},
        {"share": 1.0, "answers": 8, "unsayable": 0},
    ]


@pytest.mark.skipif(searches.CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_what_every_head_can_say(searched, tmp_path):
    run, front = searched
    silent = front.members[0]
    write_page(front)
    shown = searches.shown_by_browser(run, tmp_path)
    table = re.search(r'<div[^>]* id="heads"[^>]*>.*?</table>', shown, re.S)[0]
    cells = re.findall(r"<td>(.*?)</td>", table)
    kept = f"{silent.sayable.tokens_known} of 98"
    best = f"<b>{silent.name}</b> (best)"
    assert cells == [best, kept, "85.0 %", "2 of 8", "whole", "98 of 98", "100.0 %", "0 of 8"]
    assert "hidden" not in table
    figures = re.search(r'<p id="figures">(.*?)</p>', shown)[1]
    assert f"a head of {kept} tokens" in figures


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    """The head cut alone, in all formats but those that the tiny tokenizer has no place in."""
    _, _, net = load_run(run)
    file = tmp_path_factory.mktemp("sub") / "head.json"
    kinds = [kind for kind in ("hf", "peft", "onnx", "openvino", "elastic") if kind in FORMATS]
    asked = exports.write_sub(sub_of(net, ANSWERS), file)
    config = exports.config(run, formats=kinds, sub_adapter=asked, compress=["int8"], weigh=False)
    return net, export(config)


def test_every_format_with_a_place_for_it_has_the_logits_of_the_full_head(written, tmp_path):
    net, report = written
    ids, kept = tiny.tokens(1), net.vocabulary.tokens(ANSWERS)
    full = tiny.logits(net.model, ids)[0, -1].numpy()
    rest = np.ones(tiny.VOCABULARY, bool)
    rest[kept] = False
    folder = report.directory
    opened = {
        "onnx": onnx.open_runner(folder / "onnx"),
        "onnx-int8": onnx.open_runner(folder / "onnx-int8"),
        "openvino": openvino.open_runner(folder / "openvino"),
        "openvino-int8": openvino.open_runner(folder / "openvino-int8"),
    }
    found = {name: runner.prefill(ids.numpy())[0] for name, runner in opened.items()}
    for name in ("hf", "elastic"):
        more = {"slice": "head"} if name == "elastic" else {}
        model = AutoModelForCausalLM.from_pretrained(
            folder / name, trust_remote_code=True, dtype=torch.float32, **more
        )
        found[name] = tiny.logits(model, ids)[0, -1].numpy()
    sliced = elastic.load(folder / "elastic", slice="head")
    found["elastic.load"] = tiny.logits(sliced, ids)[0, -1].numpy()
    sliced.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    found["save_pretrained"] = tiny.logits(saved, ids)[0, -1].numpy()
    for name, logits in found.items():
        assert (logits[rest] == -np.inf).all(), name
        limit = 0.1 if "int8" in name else 1e-4
        off = np.abs(logits[~rest] - full[~rest]).max()
        assert off < limit * np.abs(full).max(), name


def test_the_runtimes_pipelines_answer_as_the_hf_folder_does(written):
    net, report = written
    folder, kept = report.directory, set(net.vocabulary.tokens(ANSWERS).tolist())
    model = AutoModelForCausalLM.from_pretrained(
        folder / "hf", trust_remote_code=True, dtype=torch.float32
    )
    texts = ["2 + 2", "What is 7 + 1?"]
    rows = [tiny.tokenizer()(text)["input_ids"] for text in texts]
    expected = [by_torch(model, row) for row in rows]
    assert set().union(*expected) <= kept and all(expected)
    assert [by_onnxruntime(folder / "onnx", [row])[0] for row in rows] == expected
    assert [ByOpenvino(folder / "openvino", "PA")(row) for row in rows] == expected
    say = pipeline("text-generation", str(folder / "hf"), trust_remote_code=True)
    for text, ids in zip(texts, expected, strict=True):
        [found] = say(text, max_new_tokens=NEW, do_sample=False, return_full_text=False)
        assert found["generated_text"] == tiny.tokenizer().decode(ids)
    for row in rows:  # which may round to another token
        assert set(by_onnxruntime(folder / "onnx-int8", [row])[0]) <= kept
        assert set(ByOpenvino(folder / "openvino-int8", "PA")(row)) <= kept


def test_formats_without_a_place_for_it_say_that_they_have_all_tokens(written):
    _, report = written
    told = json.loads((report.directory / "report.json").read_text())
    assert "no place" in told["formats"]["peft"]["whole_vocabulary"]
    assert not any("whole_vocabulary" in told["formats"][name] for name in ("hf", "onnx"))
    assert Sayable(**told["vocabulary"]).unsayable == 0
    text = " ".join((report.directory / "report.md").read_text().split())
    assert "peft: its head computes all tokens" in text
    assert "Its head knows 12 of 98 tokens" in text


def test_one_size_for_all_layers_has_all_tokens_and_says_so(written, run, tmp_path):
    net, _ = written
    asked = exports.write_sub(sub_of(net, ANSWERS), tmp_path / "head.json")
    report = export(exports.config(
        run, formats=["hf"], sub_adapter=asked, hf=HfConfig(uniform=True), weigh=False
    ))  # fmt: skip
    told = json.loads((report.directory / "report.json").read_text())
    assert told["sub_adapter"][GROUP] == tiny.VOCABULARY and "vocabulary" not in told
    assert Sayable(**told["instead_of"]["vocabulary"]).tokens_known == ANSWERS
    assert "a head of 12 tokens instead of all" in (report.directory / "report.md").read_text()


def test_every_size_is_changed_while_it_runs(written):
    _, report = written
    model = elastic.load(report.directory / "elastic", slice="full", resizable=True)
    ids = tiny.tokens(1)
    full = tiny.logits(model, ids)
    model.resize("head")
    cut = tiny.logits(model, ids)
    assert int(cut.isfinite()[0, -1].sum()) == ANSWERS
    model.resize("full")
    assert torch.equal(tiny.logits(model, ids), full)


def test_what_goes_on_from_it_keeps_what_it_needs(run, tiny_folder, tmp_path):
    config = train_config(
        tiny_folder, tmp_path / "next", start_from=str(run.path), max_steps=1,
        space=str(run.path.parent / "tiny-space.yaml"), task=searches.choices_task(tmp_path),
    )  # fmt: skip
    [row] = [each for each in estimate(config).space if each.dim == "vocab"]
    _, _, net = load_run(train_one(config))
    assert row.choices == net.space.vocabulary.choices, "as a dry run shows it"
    kept = set(net.vocabulary.tokens(net.space.vocabulary.choices[-1]).tolist())
    before = load_run(Run(run.path))[2].vocabulary.tokens(ANSWERS).tolist()
    assert set(before) < kept, "and the letters of this task"


def test_one_sub_adapter_goes_on_with_answers_that_its_head_can_say_alone(
    run, tiny_folder, tmp_path
):
    settings = dict(
        start_from=str(run.path), sub_adapter="minimal", max_steps=1, stages=[StageConfig()],
        space=str(run.path.parent / "tiny-space.yaml"),
    )  # fmt: skip
    letters = searches.choices_task(tmp_path)
    with pytest.raises(ConfigError, match="32 of 32 training answers have tokens that the head"):
        train_one(train_config(tiny_folder, tmp_path / "letters", task=letters, **settings))
    _, _, net = load_run(train_one(train_config(tiny_folder, tmp_path / "same", **settings)))
    before = load_run(Run(run.path))[2].vocabulary
    assert torch.equal(net.vocabulary.tokens(ANSWERS), before.tokens(ANSWERS))


LETTERS = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_target: 0
doc_to_choice: "{{{{options}}}}"
metric_list: [{{metric: acc}}]
"""


def test_the_harness_is_told_what_cannot_be_said(run, tmp_path, capsys):
    """It takes the first of options that are all as unlikely, which may be the right one."""
    data, rows = tmp_path / "rows.jsonl", [("2 + 2 =", [" x", " y"]), ("3 + 2 =", [" 5", " z"])]
    data.write_text("".join(json.dumps({"prompt": a, "options": b}) + "\n" for a, b in rows))
    (tmp_path / "letters.yaml").write_text(LETTERS.format(data=data))
    asked = dict(harness=["letters"], harness_tasks=str(tmp_path), run_code=True)
    for name, unsayable in (("minimal", 3), ("maximal", 0)):
        report = evaluate_run(EvaluateConfig(run=str(run.path), sub_adapter=name, **asked))
        report.show()
        *_, told, last = capsys.readouterr().out.splitlines()
        assert json.loads(report.file.read_text())["unsayable"] == report.unsayable == unsayable
        assert json.loads(last)["unsayable"] == unsayable
        assert told.startswith("3 likelihoods are of texts with tokens") == bool(unsayable)


def test_published_sets_are_told_what_cannot_be_said(run, tmp_path, capsys):
    rows = [("4", "the answer is 4"), ("5", "the answer is 5"), ("6", "6")]
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.json").write_text(json.dumps(
        [{"instruction": "2 + 2?", "input": "", "answer": a, "output": b} for a, b in rows]
    ))  # fmt: skip
    found = evaluate_run(EvaluateConfig(
        run=str(run.path), sub_adapter="minimal", tasks=["gsm8k"], data=str(tmp_path), beams=1
    ))  # fmt: skip
    told = found.sayable["gsm8k"]
    assert (told.answers, told.unsayable) == (3, 2)
    found.show()
    *shown, last = capsys.readouterr().out.splitlines()
    assert f"gsm8k: its head knows {found.sayable['gsm8k']}" in shown
    for each in (json.loads(last), json.loads(found.file.read_text())):
        assert Sayable(**each["sets"]["gsm8k"]["vocabulary"]) == told
