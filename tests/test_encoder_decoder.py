"""Encoder-decoder models train, evaluate and merge as decoders do; what is missing says so."""

import pytest
import torch
from transformers import AutoTokenizer

from elastic import models
from elastic.batching import IGNORED, collate, encode
from elastic.config import AdapterConfig, ExportConfig, StageConfig
from elastic.errors import ModelError
from elastic.evaluate import answers, evaluate
from elastic.exporter import export
from elastic.importance import channel_order
from elastic.merging import compact
from elastic.search_config import LatencyConfig, SearchConfig
from elastic.slicing import sliced
from elastic.space import SearchSpace
from elastic.study import search
from elastic.supernet import Supernet
from elastic.tasks.base import Example
from elastic.timing import time_run
from elastic.training import train
from tests import tiny
from tests.test_supernet import close, several
from tests.tiny_runs import train_config

SPACE = [
    {
        "blocks": "*.block.*.layer.0",
        "adapt": ["SelfAttention.q", "SelfAttention.v"],
        "groups": {"rank": {"dim": "rank", "of": ["SelfAttention.q", "SelfAttention.v"],
                            "choices": [1.0, 0.5, 1]}},
    },
    {
        "blocks": "encoder.block.*.layer.1",
        "adapt": ["DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo"],
        "groups": {"width": {"dim": "width", "choices": [1.0, 0.5, 0.25],
                             "outputs": ["DenseReluDense.wi_0", "DenseReluDense.wi_1"],
                             "inputs": ["DenseReluDense.wo"]}},
    },
    {
        "blocks": "decoder.block.*.layer.2",
        "adapt": ["DenseReluDense.wo"],
        "groups": {"width": {"dim": "width", "choices": [1.0, 0.5],
                             "outputs": ["DenseReluDense.wi_0", "DenseReluDense.wi_1"],
                             "inputs": ["DenseReluDense.wo"]}},
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_t5(tmp_path_factory.mktemp("t5"))


def net_of(method: str = "lora") -> Supernet:
    net = Supernet(tiny.t5(dtype=torch.float64), SearchSpace.from_dict(SPACE),
                   tiny.ADAPTERS[method])  # fmt: skip
    net.reorder(tiny.permutations(net))
    return tiny.randomize_(net)


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
    model = models.load_model(str(folder), models.ModelConfig(dtype="float32", device="cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = ["ab", "a longer prompt", "x", "what?"]
    generated = answers(model, tokenizer, prompts, new_tokens=4, batch=2)
    alone = [answers(model, tokenizer, [prompt], new_tokens=4)[0] for prompt in prompts]
    assert generated == alone and len(set(generated)) > 1
    options = ("b", "another one", "?!")
    examples = [Example(p, options[i % 3], options) for i, p in enumerate(prompts * 5)]
    score = evaluate(model, tokenizer, examples, batch_tokens=24)
    assert score == evaluate(model, tokenizer, examples, batch_tokens=4096)
    assert 0 < score.accuracy < 1


def test_likelihood_is_the_decoders(folder):
    """The option whose summed log-probability, computed by hand, is largest."""
    model = models.load_model(str(folder), models.ModelConfig(dtype="float32", device="cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = ("b", "another one", "?!")
    sums = []
    for option in options:
        target = torch.tensor([encode(tokenizer, "ab", option, encoder_decoder=True).ids])
        source = torch.tensor([tokenizer("ab")["input_ids"]])
        logits = outputs(model, source, target).log_softmax(-1)
        sums.append(float(logits.gather(-1, target[..., None]).sum()))
    best = options[max(range(3), key=sums.__getitem__)]
    found = {o: evaluate(model, tokenizer, [Example("ab", o, options)]).accuracy for o in options}
    assert found == {option: float(option == best) for option in options}


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


def test_what_is_not_there_yet_is_refused(folder, tmp_path, monkeypatch):
    import yaml

    file = tmp_path / "t5.yaml"
    file.write_text(yaml.safe_dump(SPACE))
    run = train(
        train_config(
            folder, tmp_path / "run", space=str(file), adapter=AdapterConfig(rank=8),
            stages=[StageConfig(), StageConfig(train_dims=["rank", "width"])],
            progressivity=["rank", "width"],
        )
    )  # fmt: skip
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("weights were loaded"))
    path = str(run.path)
    for command, config in (
        (search, SearchConfig(run=path)),
        (export, ExportConfig(run=path)),
        (time_run, LatencyConfig(run=path)),
    ):
        with pytest.raises(ModelError, match="is an encoder-decoder model"):
            command(config)
