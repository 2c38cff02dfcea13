"""Prompt and answer as one text, no end or start twice, and nothing that the model has no place
for."""

import pytest
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from elastic.data.encoding import Limits, encode, encode_all, encode_example, prompt_ids
from elastic.data.task import Example
from elastic.errors import DataError
from elastic.evaluation.evaluate import answers, evaluate
from tests.helpers import tiny


def ended(start: bool = False) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, which appends an end to whatever it reads."""
    found = tiny.tokenizer()
    single = ("<bos> " if start else "") + "$A <eos>"
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<bos>", tiny.BOS), ("<eos>", tiny.EOS)]
    )
    return found


@pytest.mark.parametrize("start", [False, True])
def test_an_end_stands_at_the_end_alone(start):
    words = ended(start)
    encoded = encode(words, "two?", "4")
    assert words.decode(encoded.ids) == ("<bos>" if start else "") + "two? 4<eos>"
    assert words.decode(encoded.ids[-encoded.answer :]) == " 4<eos>"
    example = Example("two?", "4")
    assert prompt_ids(words, example, tiny.llama()) == list(encoded.ids[: -encoded.answer])
    source = encode(words, "two?", "4", encoder_decoder=True).source
    assert source[-1] == tiny.EOS, "an encoder reads it"


def test_an_end_or_a_start_in_the_text_is_not_doubled():
    words = tiny.tokenizer()
    assert words.decode(encode(words, "<bos>two?", "4<eos>").ids) == "<bos>two? 4<eos>"
    kept = encode(ended(), "two?<eos>", "4")
    assert words.decode(kept.ids) == "two?<eos> 4<eos>", "what the user wrote stays"


def test_prompt_and_answer_are_tokens_of_one_text():
    """A tokenizer that puts a blank before every text it is given would say two before an answer
    that it read alone."""
    letters = ["<unk>", "<eos>", "▁", *"abc?12"]
    backend = Tokenizer(models.BPE({**{t: n for n, t in enumerate(letters)}, "▁1": len(letters)},
                                   [("▁", "1")], unk_token="<unk>"))  # fmt: skip
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    encoded = encode(words, "ab?", "1")
    whole = words("ab? 1")["input_ids"]
    assert list(encoded.ids) == [*whole, words.eos_token_id]
    assert encoded.answer == 2, "the answer and its end"


def small(kind):
    sizes = dict(vocab_size=tiny.VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    if kind == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **sizes)
        return GPT2LMHeadModel(config).eval()
    config = OPTConfig(hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=1,
                       num_attention_heads=2, max_position_embeddings=32, **sizes)  # fmt: skip
    return OPTForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_row_longer_than_learnt_positions_is_named(kind):
    model, words = small(kind), tiny.tokenizer()
    assert Limits.of(model).positions == 32
    fits = Example("x" * 28, "4", where="f:1")  # with start, blank and end
    long = Example("x" * 29, "4", where="f:2")
    assert len(encode_all(words, [fits], model)[0].ids) == 32
    evaluate(model, words, [fits], quiet=True)
    for fails in (
        lambda: encode_all(words, [fits, long], model),
        lambda: evaluate(model, words, [fits, long], quiet=True),
        lambda: answers(model, words, [long], new_tokens=9, quiet=True),
    ):
        with pytest.raises(DataError, match=r"f:2: .* and the model has 32 positions; .*cutoff"):
            fails()


def test_positions_without_a_table_have_no_end():
    assert Limits.of(tiny.llama()).positions is None
    assert Limits.of(tiny.t5()).positions is None


def test_a_token_beyond_the_embedding_is_named():
    words, model = tiny.tokenizer(), tiny.llama()
    words.add_tokens(["<new>"])
    with pytest.raises(DataError, match=rf"f:3: token {tiny.VOCABULARY} of the tokenizer is none"):
        encode_all(words, [Example("a<new>", "b", where="f:3")], model)


@pytest.mark.parametrize("cutoff", [2, 5, 8, 99])
def test_a_cutoff_keeps_the_start_of_the_sequence_and_the_end_of_the_prompt(cutoff):
    words, model = tiny.tokenizer(), tiny.llama()
    example = Example("0123456", "ab", cutoff=cutoff)
    encoded = encode_example(words, model, example)
    whole = encode(words, "0123456", "ab")
    kept = encoded.ids[: -encoded.answer]
    assert len(kept) == min(cutoff, 8) and kept[0] == tiny.BOS
    assert kept[1:] == whole.ids[9 - len(kept) : 8]
    assert encoded.ids[-encoded.answer :] == whole.ids[-whole.answer :]
    assert prompt_ids(words, example, model) == list(kept)
