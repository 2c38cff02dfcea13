"""Encoder-decoder models go the way of decoders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from elastic.config import (
    AdapterConfig,
    BudgetConfig,
    CompensationConfig,
    ExportConfig,
    LatencyConfig,
    ModelConfig,
    SearchConfig,
    StageConfig,
    TableConfig,
    TimingConfig,
)
from elastic.data.collating import IGNORED, collate
from elastic.data.encoding import encode
from elastic.data.task import Example
from elastic.evaluation.evaluate import answers, evaluate
from elastic.exporting.command import export
from elastic.formats.runner import runner_of
from elastic.latency import bench
from elastic.latency.command import time_run
from elastic.models import loading
from elastic.searching.study import search
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact, sliced
from elastic.supernet.importance import channel_order
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.laws import close, several
from tests.helpers.seq2seq import SPACE, drive, net_of
from tests.helpers.tiny_runs import ONE_ROUND, fake_measure, train_config

NOTHING = CompensationConfig(degrees=[0.0])
"""What is made up for has laws of its own."""
FEW = TableConfig(seen=4, unseen=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # MLPs of 96, 48 and 24: OpenVINO ends the process at 32 (see exporting/test_command.py).
    return tiny.save_t5(tmp_path_factory.mktemp("t5"), d_ff=96)


def outputs(model, source, target) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=source, labels=target, use_cache=False).logits


@pytest.mark.parametrize("method", ["lora", "sorsa"])
def test_active_equals_sliced_equals_merged(method):
    net = net_of(method)
    source, target = tiny.tokens(2, 9), tiny.tokens(2, 5, seed=1)
    seen = []
    for sub in several(net):
        with net.active(sub) as model:
            expected = outputs(model, source, target)
        # T5's norms work in float32 inside.
        close(outputs(sliced(net, sub), source, target), expected, 1e-5)
        close(outputs(compact(net, sub), source, target), expected, 1e-5)
        seen.append(expected)
    assert not torch.allclose(seen[0], seen[1])


def test_prompts_go_to_the_encoder_and_answers_to_the_decoder(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    short = encode(tokenizer, "ab", "cd", encoder_decoder=True)
    long = encode(tokenizer, "a longer prompt", "c", encoder_decoder=True)
    assert tokenizer.decode(short.source, skip_special_tokens=True) == "ab"
    assert tokenizer.decode(short.ids[:-1]) == "cd" and short.ids[-1] == tokenizer.eos_token_id
    batch = collate([short, long], tiny.PAD)
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["attention_mask"].sum(1).tolist() == [len(short.source), len(long.source)]
    assert batch["labels"][0, :3].tolist() == list(short.ids)
    assert (batch["labels"][0, 3:] == IGNORED).all()
    assert batch["input_ids"][1, : len(long.source)].tolist() == list(long.source)


def test_scores_and_answers_do_not_depend_on_the_batch(folder):
    model = loading.load_model(str(folder), ModelConfig(dtype="float32", device="cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = ["ab", "a longer prompt", "x", "what?"]
    asked = [Example(prompt, "") for prompt in prompts]
    generated = answers(model, tokenizer, asked, new_tokens=4, batch=2)
    alone = [answers(model, tokenizer, [one], new_tokens=4)[0] for one in asked]
    assert generated == alone and len(set(generated)) > 1
    options = ("b", "another one", "?!")
    examples = [Example(p, options[i % 3], options) for i, p in enumerate(prompts * 5)]
    score = evaluate(model, tokenizer, examples, batch_tokens=24)
    assert score == evaluate(model, tokenizer, examples, batch_tokens=4096)
    assert 0 < score.accuracy < 1


@pytest.mark.parametrize(
    "options",
    [
        ("b", "another one", "?!"),
        ("one a", "one z", "one of"),
        ("it is 51", "it is g6", "it is 784"),
        ("it is ag", "it is d8", "it is ba"),
    ],
)
def test_likelihood_is_the_decoders(folder, options):
    """The option whose summed log-probability, computed by hand without its end, is largest."""
    model = loading.load_model(str(folder), ModelConfig(dtype="float32", device="cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt in ("ab", "x", "what?", "a longer prompt"):
        sums = []
        for option in options:
            target = torch.tensor([encode(tokenizer, prompt, option, encoder_decoder=True).ids])
            source = torch.tensor([tokenizer(prompt)["input_ids"]])
            logits = outputs(model, source, target).log_softmax(-1)
            sums.append(float(logits.gather(-1, target[..., None])[:, :-1].sum()))
        best = options[max(range(3), key=sums.__getitem__)]
        asked = [Example(prompt, option, options) for option in options]
        assert evaluate(model, tokenizer, asked).correct == tuple(o == best for o in options)


def test_padding_does_not_count_in_the_order_of_channels(folder):
    model = tiny.t5(dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bound = SearchSpace.from_dict(SPACE).bind(model, 8)
    texts = [("a", "b"), ("a much longer prompt", "and its answer")]
    examples = [encode(tokenizer, p, a, encoder_decoder=True) for p, a in texts]
    together = channel_order(model, bound, "activation", [collate(examples, tiny.PAD)])
    apart = channel_order(model, bound, "activation", [collate([e], tiny.PAD) for e in examples])
    assert together.keys() == apart.keys()
    for name, index in together.items():
        assert torch.equal(index, apart[name])
    assert any(not torch.equal(i, torch.arange(len(i))) for i in together.values())


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    (place / "t5.yaml").write_text(yaml.safe_dump(SPACE))
    return train_one(
        train_config(
            folder, place / "run", space=str(place / "t5.yaml"), adapter=AdapterConfig(rank=8),
            stages=[StageConfig(), StageConfig(train_dims=["rank", "width"])],
            progressivity=["rank", "width"],
        )
    )  # fmt: skip


def test_a_runner_decodes_what_a_forward_pass_says(folder):
    model = loading.load_model(str(folder), ModelConfig(dtype="float32", device="cpu"))
    source, target = tiny.tokens(3, 9), tiny.tokens(3, 5, seed=1)
    start = torch.full((3, 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        expected = model(input_ids=source, decoder_input_ids=torch.cat([start, target], 1)).logits
    found = drive(runner_of(model), source.numpy(), target.numpy())
    np.testing.assert_allclose(found, expected.transpose(0, 1).numpy(), rtol=0, atol=1e-5)


def test_searched_and_written(run, monkeypatch):
    monkeypatch.setattr(bench, "measure", fake_measure)
    front = search(SearchConfig(run=str(run.path), trials=5, starts=3, timing=ONE_ROUND, table=FEW,
                                test_front=2, budget=BudgetConfig(prefill_ms="90%"),
                                compensation=NOTHING))  # fmt: skip
    assert front.best.figures.prefill_ms <= 0.9 * front.full.prefill_ms
    report = export(ExportConfig(run=str(run.path), timing=ONE_ROUND, runtime_examples=2,
                                 compensation=NOTHING,
                                 compress=["int8", "int4_awq"]))  # fmt: skip
    written = report.contents["formats"]
    assert "activations are not computed" in written["openvino-int4_awq"]["skipped"]
    assert written["hf"]["greedy_tokens_equal"] and written["hf"]["decode_ms"] > 0
    for kind in ("onnx", "openvino"):
        assert written[kind]["greedy_tokens_equal"] and written[kind]["decode_ms"] > 0
        small = written[f"{kind}-int8"]
        assert small["decode_ms"] > 0 and small["bytes"] < written[kind]["bytes"]
        assert small["compression"]["layers"].keys() == {"int8"}
    whole = export(ExportConfig(run=str(run.path), sub_adapter="maximal", formats=["peft"],
                                timing=ONE_ROUND, accuracy=False, runtime_examples=0))  # fmt: skip
    assert whole.contents["formats"]["peft"]["greedy_tokens_equal"]
    config = json.loads((whole.directory / "peft" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_other_runtimes_are_timed(run, runtime):
    report = time_run(LatencyConfig(
        run=str(run.path), sub_adapter="minimal",
        timing=TimingConfig(runtime=runtime, prompt_tokens=4, new_tokens=2, rounds=2, max_rounds=2,
                            tolerance=1e9),
    ))  # fmt: skip
    told = report.as_dict()
    assert told["prefill_ms"] > 0 and told["decode_ms"] > 0
