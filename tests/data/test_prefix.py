"""What all sequences begin with is read once, and nothing that is said of them changes."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from elastic.data import prefix
from elastic.data.answers import answer_logits
from elastic.data.collating import collate
from elastic.data.encoding import Encoded
from elastic.data.prefix import read, shared
from elastic.data.task import Example
from elastic.evaluation.evaluate import evaluate
from elastic.supernet.compact import compact
from tests.helpers import tiny
from tests.helpers.families import DECODER, FAMILIES, GROUPED, ROUNDED, SMALL, model_of

TOKENIZER = tiny.tokenizer()
OTHERS = (
    "rwkv",
    "llama, classes",
    "bert, classes",
    "bert, a score",
    "roberta",
    "minilm",
    "t5",
    "flan-t5",
)
DECODERS = [family for family in FAMILIES if family not in OTHERS]
START = "Below is an instruction. "
ASKED = [
    Example(f"{START}{question}?", answer, options)
    for question, answer, options in [
        ("Yes or no, what is it that it is", "no", ("yes", "no")),
        ("One", "a1", ("a1", "a2", "a3")),
        ("Is it", "true", ("true", "false")),
        ("Say something longer than the others say", "ok", ()),
        ("W", "b2", ("b1", "b2")),
        ("Which one", "x", ("x", "yy", "zzz")),
    ]
]


def sequences(start: int = 12) -> list[Encoded]:
    """Of 16 to 45 tokens, whose first ones are the same, and whose next is not."""
    ids = tiny.tokens(4, 60).tolist()
    rests = [(3, 1), (33, 5), (18, 2), (9, 4)]
    return [
        Encoded((*ids[0][:start], 10 + row, *ids[row][:length], tiny.EOS), answer)
        for row, (length, answer) in enumerate(rests)
    ]


def alone(model: nn.Module, sequence: Encoded) -> torch.Tensor:
    """Logits that predict the answer, of the whole sequence and nothing beside it."""
    return tiny.logits(model, torch.tensor([sequence.ids]))[0, -sequence.answer - 1 : -1]


def gone_on(model: nn.Module, found: prefix.Prefix, whole: list[Encoded]) -> list[torch.Tensor]:
    """The same, of sequences that go on from a prefix together."""
    with torch.no_grad():
        batch = collate([found.without(sequence) for sequence in whole], tiny.PAD)
        logits, _ = answer_logits(model, batch, prefix=found)
    return [row[-each.answer :] for row, each in zip(logits, whole, strict=True)]


def same(model: nn.Module, whole: list[Encoded], precision: float) -> prefix.Prefix:
    with torch.no_grad():
        found = read(model, whole)
    assert found.length == 12
    for logits, each in zip(gone_on(model, found, whole), whole, strict=True):
        expected = alone(model, each)
        largest = float(expected.abs().max())
        torch.testing.assert_close(
            logits, expected.to(logits.dtype), rtol=0, atol=precision * largest
        )
    return found


@pytest.mark.parametrize("family", DECODERS)
def test_what_goes_on_from_a_start_says_what_the_whole_says(family):
    same(model_of(family), sequences(), 1e-5 if family in ROUNDED else 1e-10)


@pytest.mark.parametrize("window", [2, 5, 12, 13, 16, 30])
def test_a_window_reaches_back_into_the_start(window):
    """Shorter than the start, as long, and longer: of the window's own size the cache has a case
    of its own."""
    config = transformers.MistralConfig(**SMALL, **GROUPED, sliding_window=window)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.MistralForCausalLM(config).double().eval()
    same(model, sequences(), 1e-6)  # its norms round to float32


def test_windows_in_some_layers_and_not_in_others():
    settings = {**GROUPED, "num_hidden_layers": 4, "sliding_window": 6, "max_window_layers": 2}
    config = transformers.Qwen2Config(**SMALL, **settings, use_sliding_window=True)
    assert set(config.layer_types) == {"full_attention", "sliding_attention"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(config).double().eval()
    same(model, sequences(), 1e-6)


@pytest.mark.parametrize("family", OTHERS)
def test_no_start_is_shared_without_a_cache_of_keys(family):
    assert read(model_of(family), sequences()) is None


def test_no_start_is_shared_where_it_would_turn_by_other_angles():
    """Of longer texts longrope has other frequencies, of the start too."""
    halves = [1.0] * 4 + [2.0] * 4
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
            "long_factor": halves, "original_max_position_embeddings": 16}  # fmt: skip
    settings = {**DECODER, "num_key_value_heads": 2, "original_max_position_embeddings": 16}
    config = transformers.Phi3Config(**SMALL, **settings, rope_parameters=rope)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Phi3ForCausalLM(config).double().eval()
    whole = sequences()
    assert read(model, whole) is None
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "_rotates_by_length", lambda config: False)
        found = gone_on(model, read(model, whole), whole)
    assert (found[1] - alone(model, whole[1])).abs().max() > 1e-3


def test_no_start_is_shared_with_a_state():
    config = transformers.MambaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2,
        pad_token_id=tiny.PAD, bos_token_id=tiny.BOS, eos_token_id=tiny.EOS,
    )  # fmt: skip
    with torch.no_grad():
        assert read(transformers.MambaForCausalLM(config).eval(), sequences()) is None


def test_one_reading_serves_batches_of_any_size():
    model, whole = model_of("gemma2"), sequences()
    with torch.no_grad():
        found = read(model, whole)
    together = gone_on(model, found, whole)
    for row in (3, 0, 1, 2):
        torch.testing.assert_close(
            gone_on(model, found, [whole[row]])[0], together[row], rtol=0, atol=1e-5
        )
    for before, after in zip(together, gone_on(model, found, whole), strict=True):
        assert torch.equal(before, after)


def test_it_is_the_active_sub_adapter_that_reads():
    """And its compact model, whose layers have other numbers of heads, says the same."""
    net = tiny.supernet(heads=True)
    whole = sequences()
    for sub in (net.space.minimal(), net.space.maximal()):
        with net.active(sub) as model:
            found = same(model, whole, 1e-10)
        small = compact(net, sub)
        again = same(small, whole, 1e-10)
        for one, other in zip(found.cache.layers, again.cache.layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys)


# How much is shared


IDS = st.lists(st.integers(3, 5), min_size=2, max_size=12)


@given(st.lists(st.builds(lambda ids, n: Encoded(tuple(ids), min(n, len(ids))), IDS,
                          st.integers(1, 4)), max_size=5), IDS)  # fmt: skip
def test_the_longest_common_start_leaves_a_token_before_every_answer(found, start):
    found = [Encoded((*start, *each.ids), each.answer) for each in found]
    length = shared(found)

    def may(length: int) -> bool:
        starts = {each.ids[:length] for each in found}
        return len(starts) == 1 and all(len(x.ids) - x.answer > length for x in found)

    assert (may(length) or length == 0) and not may(length + 1)


def test_what_does_not_pay_is_not_shared():
    model = tiny.llama()
    with torch.no_grad():
        assert read(model, sequences(prefix.SHORTEST)).length == prefix.SHORTEST
        assert read(model, sequences(prefix.SHORTEST - 1)) is None
        assert read(model, sequences()[:1]) is None
        assert read(model, []) is None


# Scores


def scores(model: nn.Module, asked: list[Example], batch_tokens: int = 64) -> tuple:
    """What was found right, and how many tokens the model read for it."""
    seen = []
    handle = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].numel())
    )
    try:
        return evaluate(model, TOKENIZER, asked, batch_tokens=batch_tokens, quiet=True), sum(seen)
    finally:
        handle.remove()


@pytest.mark.parametrize("batch_tokens", [1, 40, 333, 10**6])
def test_scores_are_the_same_and_cost_less(batch_tokens, monkeypatch):
    model = tiny.llama()
    asked = [example for example in ASKED for _ in range(2)]
    found, read_once = scores(model, asked, batch_tokens)
    monkeypatch.setattr(prefix, "SHORTEST", 1000)
    expected, read_always = scores(model, asked, batch_tokens)
    assert found == expected and len({*found.correct}) == 2
    assert read_once < 0.75 * read_always
