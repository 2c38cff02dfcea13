"""RWKV has a state instead of a cache and remembers padding; nothing may show of either."""

import numpy as np
import pytest
import torch
import yaml

from elastic.config import (
    AdapterConfig,
    BudgetConfig,
    CompensationConfig,
    ExportConfig,
    ModelConfig,
    SearchConfig,
    StageConfig,
    TableConfig,
    TimingConfig,
)
from elastic.data.answers import answer_logits, padded_behind
from elastic.data.collating import collate
from elastic.data.encoding import encode
from elastic.data.task import Example
from elastic.errors import ConfigError, ModelError
from elastic.evaluation.evaluate import answers, evaluate
from elastic.exporting.command import export
from elastic.formats.runner import runner_of
from elastic.latency import bench
from elastic.models import loading
from elastic.searching.study import search
from elastic.spaces.declared import SearchSpace
from elastic.supernet.importance import channel_order
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.families import model_of
from tests.helpers.seq2seq import drive
from tests.helpers.tiny_runs import ONE_ROUND, fake_measure, train_config

PAIRS = [("a", "b"), ("a much longer prompt", "and its answer"), ("ab", "cde")]


@pytest.fixture(scope="module")
def model():
    return model_of("rwkv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of four blocks, whose weights and states transformers halves every second block."""
    folder = tmp_path_factory.mktemp("rwkv")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_of("rwkv", torch.float32, layers=4)
    model.config.update({"rescale_every": 2, "use_cache": True})
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    space = SearchSpace.load("rwkv").as_dict()
    space["groups"]["depth"] = {"dim": "depth", "choices": [4, 3, 2]}
    (place / "space.yaml").write_text(yaml.safe_dump(space))
    dims = ["rank", "width", "depth"]
    return train_one(
        train_config(
            folder, place / "run", space=str(place / "space.yaml"), progressivity=dims,
            stages=[StageConfig(), StageConfig(train_dims=dims)], adapter=AdapterConfig(rank=8),
        )
    )  # fmt: skip


def test_padding_goes_behind():
    ids = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    found = padded_behind({"input_ids": ids, "attention_mask": mask})
    assert found["input_ids"].tolist() == [[5, 6, 0, 0], [1, 2, 3, 4]]
    assert found["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_what_stands_beside_an_example_does_not_matter(model):
    examples = [encode(tiny.tokenizer(), prompt, answer) for prompt, answer in PAIRS]
    together, labels = answer_logits(model, collate(examples, tiny.PAD))
    for row, example in enumerate(examples):
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            alone = model(ids).logits[0, -example.answer - 1 : -1]
        torch.testing.assert_close(
            together[row, -example.answer :],
            alone,
            rtol=1e-5,
            atol=1e-5,  # it rounds to float32
        )
        assert labels[row, -example.answer :].tolist() == list(example.ids[-example.answer :])


def test_the_order_of_channels_has_no_part_of_padding(model):
    space = SearchSpace.load("rwkv").bind(model, tiny.RANK)
    examples = [encode(tiny.tokenizer(), prompt, answer) for prompt, answer in PAIRS]
    together = channel_order(model, space, "activation", [collate(examples, tiny.PAD)])
    apart = channel_order(model, space, "activation", [collate([e], tiny.PAD) for e in examples])
    assert all(torch.equal(apart[name], order) for name, order in together.items())


def test_batches_do_not_change_what_is_said(model):
    examples = [Example(prompt, answer) for prompt, answer in (*PAIRS, ("cd", "e"))]
    tokenizer = tiny.tokenizer()
    expected = []
    for example in examples:
        ids = tokenizer(example.prompt)["input_ids"]
        start = len(ids)
        while len(ids) < start + 6 and ids[-1] != tiny.EOS:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(tokenizer.decode(ids[start:], skip_special_tokens=True).strip())
    model.config.use_cache = True  # as real ones are saved
    for size in (1, 2, 4):
        assert answers(model, tokenizer, examples, new_tokens=6, batch=size) == expected
    beams = [answers(model, tokenizer, examples, new_tokens=6, batch=size, beams=3)
             for size in (1, 4)]  # fmt: skip
    assert beams[0] == beams[1]
    model.config.use_cache = False
    scores = [evaluate(model, tokenizer, examples, batch_tokens=n) for n in (1, 8, 10**6)]
    assert scores[0] == scores[1] == scores[2]


def test_a_runner_decodes_what_a_forward_pass_says(model):
    source, target = tiny.tokens(1, 9), tiny.tokens(1, 5, seed=1)
    with torch.no_grad():
        expected = model(torch.cat([source, target], 1)).logits[:, 8:]
    found = drive(runner_of(model), source.numpy(), target.numpy())
    np.testing.assert_allclose(found, expected.transpose(0, 1).numpy(), rtol=0, atol=1e-4)


def test_nothing_is_halved_and_the_function_is_the_same(folder):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = loading.load_model(str(folder), ModelConfig(dtype="float32", device="cpu"))
    ids = tiny.tokens()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with torch.no_grad():
        expected = theirs.train()(ids).logits  # RWKV has no dropout; it halves in evaluation only
        torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-6, atol=1e-6)
        # Norms add a small number to what was halved or not.
        torch.testing.assert_close(theirs.eval()(ids).logits, expected, rtol=0, atol=5e-3)
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())
    halved = theirs.state_dict()["rwkv.blocks.3.feed_forward.value.weight"]
    assert torch.equal(halved * 2, before["rwkv.blocks.3.feed_forward.value.weight"])


def test_trained_searched_and_written(run, monkeypatch):
    monkeypatch.setattr(bench, "measure", fake_measure)
    front = search(SearchConfig(run=str(run.path), trials=6, starts=4, timing=ONE_ROUND,
                                test_front=2, budget=BudgetConfig(prefill_ms="80%"),
                                compensation=CompensationConfig(degrees=[0.0]),
                                table=TableConfig(seen=4, unseen=0)))  # fmt: skip
    assert front.best.figures.prefill_ms <= 0.8 * front.full.prefill_ms
    report = export(ExportConfig(run=str(run.path), timing=ONE_ROUND))
    written = report.contents["formats"]
    assert written["hf"]["greedy_tokens_equal"] and written["hf"]["decode_ms"] > 0
    assert "halves some weights" in written["peft"]["skipped"]
    assert all("tracing would fix the length" in written[kind]["skipped"]
               for kind in ("onnx", "openvino"))  # fmt: skip


def test_a_runtime_that_cannot_is_refused_before_weights_load(run, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ModelError, match="tracing would fix the length; choose torch"):
        search(SearchConfig(run=str(run.path), timing=TimingConfig(runtime="onnx")))
    with pytest.raises(ConfigError, match=r"timing\.batch 2: transformers decodes one sequence"):
        search(SearchConfig(run=str(run.path), timing=TimingConfig(batch=2)))
