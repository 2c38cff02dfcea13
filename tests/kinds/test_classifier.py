"""A classification head is trained beside the factors, kept with them, and as exact as they are."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from elastic.config import (
    BudgetConfig,
    EvaluateConfig,
    ModelConfig,
    SearchConfig,
    SequenceConfig,
    StageConfig,
    TrainConfig,
)
from elastic.data import load_task
from elastic.data.answers import answer_logits
from elastic.data.collating import collate
from elastic.data.encoding import encode_all, encode_example
from elastic.data.labels import classes_in
from elastic.data.task import Example, Task, some
from elastic.errors import ConfigError, DataError, ModelError, RunError
from elastic.evaluation import statistics
from elastic.evaluation.command import evaluate_run
from elastic.evaluation.evaluate import evaluate
from elastic.formats import hf
from elastic.models import loading
from elastic.models.head import head_of, start_head_
from elastic.models.kinds import classes_of
from elastic.run import Run
from elastic.searching.study import search
from elastic.supernet.compact import compact, sliced
from elastic.supernet.store import load_run
from elastic.training.checks import with_classes
from elastic.training.command import train as train_any
from elastic.training.one_task import train_one
from elastic.training.trainer import frozen
from tests.helpers import tiny
from tests.helpers.classification import classifier_config, task_of
from tests.helpers.families import model_of
from tests.helpers.tiny_runs import assert_same_factors, interrupted

KINDS = ["bert, classes", "roberta", "llama"]
"""An encoder with token types, one whose positions count from the padding, and a decoder."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_one(classifier_config(tmp_path_factory.mktemp("bert")))


def examples_of(run: Run) -> tuple[Example, ...]:
    config = run.config()
    return load_task(config.task, config.seed).test


def logits_of(model, tokenizer, examples) -> torch.Tensor:
    batch = collate(encode_all(tokenizer, examples, model), tokenizer.pad_token_id)
    with torch.no_grad():
        return answer_logits(model, batch)[0][:, 0]


# Training


def test_the_head_is_trained_saved_and_loaded_again(run):
    config, _, net = load_run(run)
    assert config.model.classes == ["no", "yes"] == list(classes_of(net.model))
    saved = load_file(run.super_adapter / "factors.safetensors")
    started = loading.load(config.model, config.seed)
    for name, start in head_of(started.model).items():
        assert torch.equal(saved[name], net.head[name])
        assert not torch.equal(saved[name], start), f"{name} did not learn"
    assert set(net.head) == {f"{layer}.{kind}" for layer in ("classifier", "bert.pooler.dense")
                             for kind in ("weight", "bias")}  # fmt: skip


def test_active_equals_sliced_equals_merged(run):
    _, base, net = load_run(run, dtype="float64")
    tiny.randomize_(net)
    seen = []
    for name in ("maximal", "heuristic", "minimal"):
        sub = net.space.named(name)
        with net.active(sub) as model:
            expected = logits_of(model, base.tokenizer, examples_of(run))
        for small in (sliced(net, sub), compact(net, sub)):
            found = logits_of(small, base.tokenizer, examples_of(run))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        seen.append(expected)
    assert not torch.allclose(seen[0], seen[2])


def test_a_killed_run_ends_like_one_that_was_not(tmp_path, monkeypatch):
    config = classifier_config(tmp_path)
    whole = train_one(config)
    stopped = dataclasses.replace(config, run=str(tmp_path / "stopped"))
    interrupted(stopped, monkeypatch, 6)
    assert_same_factors(train_one(stopped), whole)
    other = dataclasses.replace(config, run=str(tmp_path / "other"), seed=1)
    heads = [load_file(run.super_adapter / "factors.safetensors")["classifier.weight"]
             for run in (whole, train_one(other))]  # fmt: skip
    assert not torch.allclose(*heads)


def test_a_narrow_base_keeps_a_wide_head(tmp_path):
    config = classifier_config(tmp_path, model={"dtype": "bfloat16"}, stages=[StageConfig()])
    _, base, net = load_run(train_one(config))
    assert base.model.dtype == torch.bfloat16
    assert {head.dtype for head in net.head.values()} == {torch.float32}


def test_a_fixed_teacher_keeps_its_head(run):
    _, base, net = load_run(run)
    teacher = frozen(net)
    before = logits_of(teacher, base.tokenizer, examples_of(run))
    with torch.no_grad():
        for head in net.head.values():
            head.add_(1.0)
    assert torch.equal(logits_of(teacher, base.tokenizer, examples_of(run)), before)
    assert not torch.equal(logits_of(net.model, base.tokenizer, examples_of(run)), before)


def test_a_damaged_head_is_not_loaded(run):
    _, _, net = load_run(run)
    state = net.factor_state()
    missing = {name: tensor for name, tensor in state.items() if name != "classifier.bias"}
    with pytest.raises(RunError, match=r"classifier\.bias of the head: expected \(2,\).*missing"):
        net.load_factors(missing)
    with pytest.raises(RunError, match=r"classifier\.bias of the head holds NaN"):
        net.load_factors({**state, "classifier.bias": torch.tensor([0.0, float("nan")])})


# Classes


def test_classes_are_the_answers_of_the_training_data():
    def task(answers) -> Task:
        return Task([Example(f"text {n}", answer) for n, answer in enumerate(answers)], [], [])

    assert classes_in(task(["b", "a", "b"])) == ["a", "b"]
    assert classes_in(task(["10", "9", "10"])) == ["9", "10"], "numbers go by size"
    for answers in (["a"] * 3, [str(n) for n in range(201)]):
        with pytest.raises(DataError, match=rf"{len(set(answers))} distinct answers"):
            classes_in(task(answers))


def labelled(folder, labels) -> TrainConfig:
    """A run on texts of these labels, as they stand in the file."""
    for name in ("rows", "validation", "test"):
        lines = (json.dumps({"one": f"{name} {n}", "label": label}) + "\n"
                 for n, label in enumerate(labels))  # fmt: skip
        (folder / f"{name}.json").write_text("".join(lines))
    files = {"train": "rows", "validation": "validation", "test": "test"}
    task = {split: str(folder / f"{name}.json") for split, name in files.items()}
    return classifier_config(folder, task=task)


@pytest.mark.parametrize(
    "one, other",
    [("positive", "Positive"), ("negative", " negative"), ("a  b", "a b"), (True, "true"),
     ("FALSE", False), (1, 1.0), ("1", "01"), (10, "1e1"), ("nan", "NaN")],
)  # fmt: skip
def test_labels_that_differ_in_spelling_alone_are_refused(tmp_path, monkeypatch, one, other):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("weights were loaded"))
    config = labelled(tmp_path, [one, one, "else", other])
    with pytest.raises(DataError) as caught:
        train_one(config)
    for label, count, text in ((one, 2, "rows 0"), (other, 1, "rows 3")):
        assert f"'{label}' ({count} rows, first '{text}')" in str(caught.value)
    named = ModelConfig(**vars(config.model) | {"classes": [str(one), str(other), "else"]})
    assert with_classes(dataclasses.replace(config, model=named)).model.classes == named.classes


def test_labels_that_mean_different_things_are_told_apart_and_counted(tmp_path, capsys):
    labels = ["yes", "no", 1, 2, 2.5, True, "1a", "nan", "inf", "no", 2]
    assert set(with_classes(labelled(tmp_path, labels)).model.classes) == set(map(str, labels))
    said = " ".join(capsys.readouterr().err.split())
    assert "Classes of the training data: 1 (1), 1a (1), 2 (2), 2.5 (1), True (1), inf (1)" in said
    assert "no (2), yes (1)" in said


def test_a_saved_head_of_these_classes_is_kept(tmp_path):
    folder = tmp_path / "saved"
    model = model_of("bert, classes", torch.float32)
    model.config.id2label = {0: "Up", 1: "Down", 2: "Level"}
    model.config.label2id = {name: number for number, name in model.config.id2label.items()}
    hf.write(model, tiny.tokenizer(), folder)

    def loaded(*classes: str, seed: int = 0):
        config = ModelConfig(path=str(folder), dtype="float32", device="cpu", classes=[*classes])
        found = loading.load_model(str(folder), config, seed)
        return classes_of(found), found.classifier.weight

    names, weight = loaded("down", "level", "up")
    assert names == ("up", "down", "level"), "in the order of the head"
    assert torch.equal(weight, model.classifier.weight)
    for classes in (("down", "level", "left"), ("up", "down")):
        names, weight = loaded(*classes)
        assert names == classes
        assert weight.shape == (len(classes), 64) and weight.std() > 0
        assert not torch.equal(weight[0], model.classifier.weight[0])
        assert torch.equal(weight, loaded(*classes)[1])
        assert not torch.equal(weight, loaded(*classes, seed=1)[1])


def test_what_an_encoder_was_not_saved_with_starts_alike_every_time(tmp_path):
    """A masked language model has no pooler; below the head nothing else may be missing."""
    hf.write(model_of("minilm", torch.float32), tiny.tokenizer(), tmp_path / "base")
    run = train_one(classifier_config(tmp_path, stages=[StageConfig()]))
    found = []
    for _ in range(2):
        torch.rand(7)  # whatever else has drawn numbers
        _, base, net = load_run(run)
        found.append(logits_of(net.model, base.tokenizer, examples_of(run)))
    assert torch.equal(*found)
    assert "bert.pooler.dense.weight" in net.head
    state = load_file(tmp_path / "base" / "model.safetensors")
    gone = next(name for name in state if "query.weight" in name)
    save_file({n: t for n, t in state.items() if n != gone}, tmp_path / "base/model.safetensors")
    with pytest.raises(ModelError, match=r"1 weights of BertFor.* missing .*query\.weight"):
        loading.load(run.config().model)


def test_a_norm_in_a_head_starts_as_the_identity():
    kind = transformers.ModernBertForSequenceClassification
    config = kind.config_class(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
        sep_token_id=2,
    )  # fmt: skip
    model = kind(config)
    start_head_(model, set(head_of(model)), seed=0)
    assert torch.equal(model.head.norm.weight, torch.ones(32))
    assert model(input_ids=tiny.tokens()).logits.abs().max() > 0


def test_a_class_that_training_never_sees_is_found_before_weights_load(tmp_path, monkeypatch):
    config = classifier_config(tmp_path)
    with open(tmp_path / "test.jsonl", "a") as file:
        file.write(json.dumps({"one": "x", "other": "y", "label": "maybe"}) + "\n")
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(
        DataError,
        match=r"test rows \(.*test\.jsonl\) have answers that are no class.*: maybe; name",
    ):
        train_one(
            dataclasses.replace(config, task=dataclasses.replace(config.task, test_examples=99))
        )


def test_going_on_keeps_head_and_order_of_classes(run, tmp_path):
    from elastic.training.checks import predecessor

    config = dataclasses.replace(run.config(), run=str(tmp_path / "on"), start_from=str(run.path))
    with pytest.raises(ConfigError, match="has a classification head, and a sequence"):
        predecessor(config)
    alone = dataclasses.replace(config, sub_adapter="heuristic")
    swapped = dataclasses.replace(alone.model, classes=["yes", "no"])
    with pytest.raises(ConfigError, match="tells no, yes apart, in this order, not yes, no"):
        predecessor(dataclasses.replace(alone, model=swapped))
    still = dataclasses.replace(alone.lr, base_lr=1e-12)
    unnamed = dataclasses.replace(alone.model, classes=[])
    on = train_one(dataclasses.replace(alone, lr=still, model=unnamed, distill=0.5))
    state = (load_file(r.super_adapter / "factors.safetensors") for r in (run, on))
    torch.testing.assert_close(*state, atol=1e-9, rtol=1e-6)


def test_a_finished_run_is_found_without_its_data(tmp_path):
    config = classifier_config(tmp_path, stages=[StageConfig()])
    train_one(config)
    (tmp_path / "train.jsonl").unlink()
    assert train_one(config).super_adapter.is_dir()


def test_an_unknown_class_is_named(run):
    _, base, net = load_run(run)
    with pytest.raises(DataError, match=r"answer 'maybe' is none of the 2 classes.*no, yes"):
        encode_example(base.tokenizer, net.model, Example("a b", "maybe"))


# Evaluation


@pytest.mark.parametrize("family", KINDS)
def test_the_likeliest_class_counts_whatever_stands_beside_it(family, tmp_path):
    config = classifier_config(tmp_path, family, model={"classes": ["no", "yes"]})
    base = loading.load(config.model)
    generator = random.Random(0)
    examples = [
        Example(
            "".join(generator.choices("abcdef 0123", k=length)), generator.choice(["no", "yes"])
        )
        for length in range(1, 41)
    ]
    # Of a random model all answers may be the same; with this threshold half of them are.
    logits = logits_of(base.model, base.tokenizer, examples)
    with torch.no_grad():
        for head in head_of(base.model).values():
            if len(head) == 2 and head.dim() == 1:
                middle = (logits[:, 1] - logits[:, 0]).quantile(0.5)
                head -= torch.stack([torch.tensor(0.0), middle])
    said = []
    for example in examples:
        ids = torch.tensor([base.tokenizer(example.prompt)["input_ids"]])
        with torch.no_grad():
            said.append(("no", "yes")[base.model(input_ids=ids).logits.argmax()])
    for tokens in (1, 64, 10_000):
        score = evaluate(base.model, base.tokenizer, examples, batch_tokens=tokens)
        assert list(score.said) == said
        right = [own == example.answer for own, example in zip(said, examples, strict=True)]
        assert list(score.correct) == right
    assert score.unanswered is None and len(set(said)) == 2


def test_the_second_sentence_is_told_from_the_first(tmp_path):
    config = classifier_config(tmp_path, model={"classes": ["no", "yes"]},
                               task={"second": "{other}"})  # fmt: skip
    base = loading.load(config.model)
    pairs = load_task(config.task, 0).test
    encoded = encode_example(base.tokenizer, base.model, pairs[0])
    first, second = (base.tokenizer(text)["input_ids"][1:]
                     for text in (pairs[0].prompt, pairs[0].second))  # fmt: skip
    assert encoded.ids == (tiny.BOS, *first, tiny.EOS, *second)
    assert encoded.types == (0,) * (len(first) + 2) + (1,) * len(second)
    joined = [Example(example.text, example.answer) for example in pairs]
    one, other = (logits_of(base.model, base.tokenizer, each) for each in (pairs, joined))
    assert not torch.allclose(one, other)
    without = [dataclasses.replace(encoded, types=())]
    batch = collate(without, 0)
    assert "token_type_ids" not in batch
    with torch.no_grad():
        assert not torch.allclose(answer_logits(base.model, batch)[0][0, 0], one[0])


def test_a_long_text_is_cut_to_what_the_model_reads(tmp_path):
    config = classifier_config(tmp_path, model={"classes": ["no", "yes"]})
    base = loading.load(config.model)
    long = Example("x" * 500, "no")
    assert len(encode_example(base.tokenizer, base.model, long).ids) == 128
    roberta = model_of("roberta", torch.float32)  # its positions begin behind the padding's
    roberta.config.id2label = {0: "no", 1: "yes"}
    base.tokenizer.model_max_length = 100
    found = (encode_example(base.tokenizer, model, long) for model in (base.model, roberta))
    assert [len(each.ids) for each in found] == [96, 96], "what is padded fits, too"
    base.tokenizer.model_max_length = 1 << 40
    encoded = encode_example(base.tokenizer, roberta, long)
    batch = collate([encoded, encode_example(base.tokenizer, roberta, Example("a", "no"))], 0)
    assert len(encoded.ids) == 120
    with torch.no_grad():
        answer_logits(roberta, batch)


def test_a_conversation_is_read_whole(tmp_path):
    base = loading.load(classifier_config(tmp_path, model={"classes": ["no", "yes"]}).model)
    turns = [
        tuple({"role": role, "content": text} for role, text in turn)
        for turn in ((("user", said), ("assistant", "b"), ("user", "c")) for said in ("a", "x"))
    ]
    one, other = (
        encode_example(base.tokenizer, base.model, Example("c", "no", messages=each))
        for each in turns
    )
    assert one.ids != other.ids


def test_a_decoder_looks_for_the_end_by_the_padding_it_gets(tmp_path):
    """Whatever ends and pads its texts were saved with."""
    model = model_of("llama", torch.float32)
    model.config.pad_token_id, model.config.eos_token_id = None, [5, 2]
    hf.write(model, tiny.tokenizer(), tmp_path / "base")
    config = classifier_config(tmp_path, "llama", model={"classes": ["no", "yes"]})
    base = loading.load(config.model)
    short, long = Example("ab", "no"), Example("a longer text than that", "no")
    alone = logits_of(base.model, base.tokenizer, [short])
    beside = logits_of(base.model, base.tokenizer, [short, long])[:1]
    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=1e-4)
    ids = torch.tensor([encode_example(base.tokenizer, base.model, short).ids])
    with torch.no_grad():
        torch.testing.assert_close(base.model(input_ids=ids).logits, alone, atol=1e-5, rtol=1e-4)


def test_glue_metrics_come_with_the_accuracy(run, capsys):
    asked = EvaluateConfig(run=str(run.path), sub_adapter="maximal", split="test")
    found = evaluate_run(asked)
    drawn = evaluate_run(dataclasses.replace(asked, examples=3))
    right = dict(zip((one.text for one in examples_of(run)), found.score.correct, strict=True))
    expected = [right[one.text] for one in some(examples_of(run), 3)]
    assert drawn.score.n == 3 and list(drawn.score.correct) == expected
    found.show()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    answers = [example.answer for example in examples_of(run)]
    assert told["accuracy"] == np.mean([a == s for a, s in zip(answers, found.score.said)])  # noqa: B905
    table = statistics.confusion(("no", "yes"), answers, found.score.said)
    assert told["matthews"] == statistics.matthews(table)
    assert told["f1"]["yes"] == statistics.f1(table)[1]
    for asked in ({"tasks": ["math"]}, {"harness": ["x"]}, {"text": "x"}):
        with pytest.raises(ConfigError, match="wants a model that answers with text"):
            evaluate_run(EvaluateConfig(run=str(run.path), **asked))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2))
def test_matthews_is_the_correlation_of_two_classes(pairs):
    expected, said = (np.array(column, dtype=int) for column in zip(*pairs, strict=True))
    table = statistics.confusion("01", [str(e) for e in expected], [str(s) for s in said])
    wanted = 0.0
    if len(set(expected)) == len(set(said)) == 2:
        wanted = np.corrcoef(expected, said)[0, 1]
    assert statistics.matthews(table) == pytest.approx(wanted)
    right = int((expected & said).sum())
    positive = int(expected.sum() + said.sum())
    assert statistics.f1(table)[1] == pytest.approx(2 * right / positive if positive else 0.0)


def test_matthews_of_three_classes():
    """By Gorodkin's formula on counts, worked out by hand: (9·6 - 29) / (81 - 29)."""
    table = np.array([[3, 1, 0], [0, 2, 1], [1, 0, 1]])
    assert statistics.matthews(table) == pytest.approx((9 * 6 - 29) / (81 - 29))
    assert statistics.f1(table) == pytest.approx([6 / 8, 4 / 6, 2 / 4])


# What a classifier is not asked


def test_what_needs_text_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match=r"budget\.decode_ms: nothing is decoded"):
        search(SearchConfig(run=str(run.path), budget=BudgetConfig(decode_ms="80%")))
    with pytest.raises(ConfigError, match="objectives decode_ms: nothing is decoded"):
        search(SearchConfig(run=str(run.path), objectives=["accuracy", "decode_ms"]))
    config = classifier_config(tmp_path)
    with pytest.raises(ConfigError, match="a sequence is answered with text"):
        train_any(dataclasses.replace(config, tasks=["a", "b"], sequence=SequenceConfig()))
    folder = tiny.save_t5(tmp_path / "t5")
    both = dataclasses.replace(config.model, path=str(folder))
    with pytest.raises(ModelError, match="an encoder-decoder model with a classification head"):
        train_one(dataclasses.replace(config, model=both))
    quantised = dataclasses.replace(config.model, quantise="int8")
    with pytest.raises(ModelError, match="beside which nothing is quantised yet"):
        train_one(dataclasses.replace(config, model=quantised))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_the_head(run, tmp_path):
    from elastic.training.dry_run import estimate

    config = run.config()
    found = estimate(config)
    saved = load_file(run.super_adapter / "factors.safetensors")
    assert found.trained == sum(tensor.numel() for tensor in saved.values())
    assert found.trained_by["lora"] == found.trained
    assert found.batch.answer == 0 and found.memory.total > found.memory.base
    unknown = task_of(tmp_path, train=str(tmp_path / "nowhere.jsonl"))
    bare = dataclasses.replace(config.model, classes=[])
    elsewhere = dataclasses.replace(config, run=str(tmp_path / "run"), task=unknown, model=bare)
    notes = estimate(elsewhere).notes
    assert any("two classes assumed" in note for note in notes)
