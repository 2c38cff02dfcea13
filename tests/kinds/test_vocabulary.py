"""A head that computes some tokens alone: for every family, method and format the logits of kept
tokens are the full head's, those of the others minus infinity."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaForCausalLM

from elastic.config import CompensationConfig
from elastic.data.answers import answer_logits
from elastic.data.collating import IGNORED
from elastic.errors import ConfigError
from elastic.formats import hf
from elastic.models.cut_head import CutHead
from elastic.models.modules import module_tree
from elastic.models.ties import ends_of
from elastic.models.vocabulary import cut_head, put_head_
from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.spaces.dims import VOCABULARY
from elastic.supernet.compact import compact, sliced
from elastic.supernet.cost import Counter, count
from elastic.supernet.held_out import HeldOut
from elastic.supernet.streaming import streamed
from elastic.supernet.supernet import Supernet
from elastic.training.checks import require_cut_head
from tests.helpers import tiny
from tests.helpers.families import FAMILIES, model_of, output
from tests.helpers.laws import batch_of, close, without_data

LEAST = 12
HEADED = [
    name for name in FAMILIES
    if name != "gemma2" and "Classification" not in FAMILIES[name][0]
]  # fmt: skip
TIED = ["llama, tied", "bloom", "t5"]


def space_of(name: str, choices=(1.0, 0.5, 0.01)) -> SearchSpace:
    """A shipped space with a vocabulary."""
    declared = SearchSpace.load(name).as_dict()
    first = declared[0] if isinstance(declared, list) else declared
    first["groups"]["vocab"] = {"dim": VOCABULARY, "choices": list(choices), "least": LEAST}
    return SearchSpace.from_dict(declared)


def net_of(family: str, method: str = "lora") -> Supernet:
    """Its channels, and its tokens, in another order."""
    base = model_of(family)
    net = Supernet(base, space_of(FAMILIES[family][1]), tiny.ADAPTERS[method])
    net.reorder(tiny.permutations(net))
    return tiny.randomize_(net)


def sizes(net: Supernet):
    """Sub-adapters with all tokens, the same with fewer, and which these are."""
    group = net.space.vocabulary
    assert group is not None
    for name, choice in (("maximal", group.choices[-1]), ("minimal", group.choices[1])):
        whole = net.space.with_whole_vocabulary(net.space.named(name))
        cut = SubAdapter(tuple({**whole.as_dict(), group.name: choice}.items()))
        yield whole, net.space.check(cut), net.vocabulary.tokens(choice)


def beside(found: torch.Tensor, full: torch.Tensor, kept: torch.Tensor, relative=1e-12) -> None:
    """The law."""
    rest = torch.ones(full.shape[-1], dtype=torch.bool)
    rest[kept] = False
    assert found.shape == full.shape and rest.any()
    close(found[..., kept], full[..., kept], relative)
    assert (found[..., rest] == -torch.inf).all()


@pytest.mark.parametrize("family", HEADED)
def test_every_way_to_run_it_has_the_logits_of_the_full_head(family, tmp_path):
    net = net_of(family)
    for whole, cut, kept in sizes(net):
        with torch.no_grad():
            with net.active(whole):
                full = output(net.model)
            with net.active(cut):
                beside(output(net.model), full, kept)
            beside(output(sliced(net, cut)), full, kept, 1e-9)
            small = compact(net, cut)
            small.tie_weights()  # as loaders do
            beside(output(small), full, kept, 1e-9)
        assert Counter(net.model, net.space)(cut) == count(small)
    assert not [m for m in net.model.modules() if isinstance(m, CutHead)], "it is whole again"
    hf.write(small, None, tmp_path)
    with torch.no_grad():
        loaded = hf.load(tmp_path, torch.float64)
        beside(output(loaded), full, kept, 1e-9)
    ends = ends_of(loaded)
    assert len(ends[f"{net.space.vocabulary.head}.weight"]) == 1, "a small matrix of its own"


@pytest.mark.parametrize("method", tiny.ADAPTERS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_method_has_them(method, tied):
    base = tiny.llama(tie_word_embeddings=tied)
    declared = tiny.space_dict(heads=True)
    declared["groups"]["vocab"] = {"dim": VOCABULARY, "choices": [1.0, 0.5, 20]}
    net = Supernet(base, SearchSpace.from_dict(declared), tiny.ADAPTERS[method])
    net.reorder(tiny.permutations(net))
    tiny.randomize_(net)
    ids = tiny.tokens()
    for whole, cut, kept in sizes(net):
        with net.active(whole):
            full = tiny.logits(net.model, ids)
        with net.active(cut):
            beside(tiny.logits(net.model, ids), full, kept)
        beside(tiny.logits(compact(net, cut), ids), full, kept, 1e-9)


@pytest.mark.parametrize("family", ["llama", *TIED])
def test_it_is_streamed_as_it_is_in_memory(family):
    base, space = model_of(family), space_of(FAMILIES[family][1])
    net = Supernet(copy.deepcopy(base), space, tiny.ADAPTERS["lora"])
    order = tiny.permutations(net)
    net.reorder(order)
    tiny.randomize_(net)
    bare = without_data(base, net, space, "lora", order)
    for _, cut, _ in sizes(net):
        expected, found = compact(net, cut).state_dict(), streamed(base, bare, cut).tensors
        assert set(expected) == set(found)
        for name, tensor in expected.items():
            assert torch.equal(found[name](), tensor), name


@pytest.mark.parametrize("family", ["llama, tied", "t5"])
def test_greedy_answers_are_those_of_the_full_model_among_kept_tokens(family):
    net, ids = net_of(family), tiny.tokens(1)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    for whole, cut, kept in sizes(net):
        small = compact(net, cut)
        rest = sorted(set(range(tiny.VOCABULARY)) - set(kept.tolist()))
        full = compact(net, whole).generate(ids, suppress_tokens=rest, **settings)
        found = small.generate(ids, **settings)
        start = 1 if net.model.config.is_encoder_decoder else ids.shape[1]
        assert torch.equal(found, full)
        assert set(found[0, start:].tolist()) <= set(kept.tolist())


def test_a_head_that_lacks_tokens_is_as_far_from_the_full_model_as_these_are_likely():
    net = net_of("llama")
    batch = batch_of("a b c", "d e")
    held = HeldOut(net, CompensationConfig(), [batch])
    with net.active(net.space.maximal()) as model, torch.no_grad():
        full, labels = answer_logits(model, batch)
    full = full[labels != IGNORED].log_softmax(-1)
    for whole, cut, kept in sizes(net):
        with net.active(whole) as model, torch.no_grad():
            logits = answer_logits(model, batch)[0][labels != IGNORED]
        mine, theirs = (each[:, kept].log_softmax(-1) for each in (logits, full))
        apart = (theirs.exp() * (theirs - mine)).sum(-1) - full[:, kept].logsumexp(-1)
        with net.active(cut) as model:
            assert held.divergence(model) == pytest.approx(float(apart.mean()), rel=1e-5)
        assert float(apart.mean()) > 0.01


def test_tokens_that_answers_need_stay_at_every_choice():
    bound = space_of("llama", [1.0, 0.5, 0.01, 1]).bind(model_of("llama"), tiny.RANK)
    assert bound.vocabulary.choices == (tiny.VOCABULARY, tiny.VOCABULARY // 2, LEAST)
    again = SearchSpace.from_dict(space_of("llama").as_dict())
    assert again.sections == space_of("llama").sections
    more = space_of("llama").with_least(tiny.VOCABULARY + 5).bind(model_of("llama"), tiny.RANK)
    assert more.vocabulary.choices == (tiny.VOCABULARY,)


@pytest.mark.parametrize("family, reason", [
    ("bert, classes", "a classifier's has one for every class"),
    ("gemma2", "bends its logits"),
])  # fmt: skip
def test_heads_that_cannot_be_cut_are_refused(family, reason):
    with pytest.raises(ConfigError, match=reason):
        space_of(FAMILIES[family][1]).bind(model_of(family), tiny.RANK)


def test_two_vocabularies_are_refused():
    declared = SearchSpace.load("t5").as_dict()
    for section, name in zip(declared, ["vocab", "tokens"], strict=False):
        section["groups"][name] = {"dim": VOCABULARY, "choices": [1.0, 0.5]}
    with pytest.raises(ConfigError, match="declare it once"):
        SearchSpace.from_dict(declared).bind(model_of("t5"), tiny.RANK)


class Bent(LlamaForCausalLM):
    """Its logits end at 30, as no setting of its says."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = 30 * torch.tanh(found.logits / 30)
        return found


@pytest.mark.parametrize("tied", [True, False])
def test_a_cut_head_is_not_resized_as_if_it_were_whole(tied, tmp_path):
    """transformers would take its rows for those of the first tokens."""
    model = tiny.llama(tie_word_embeddings=tied)
    put_head_(model, "lm_head", cut_head(model.lm_head, torch.tensor([5, 2, 9])))
    hf.write(model, None, tmp_path)
    ids = tiny.tokens()
    for each in (model, module_tree(model), hf.load(tmp_path, torch.float64)):
        before = tiny.logits(each, ids)
        for tokens in (3, tiny.VOCABULARY, tiny.VOCABULARY + 8):
            with pytest.raises(ValueError, match="some tokens alone"):
                each.resize_token_embeddings(tokens)
        assert torch.equal(tiny.logits(each, ids), before), "it is left as it was"


@pytest.mark.parametrize("kind, refused", [(LlamaForCausalLM, False), (Bent, True)])
def test_code_behind_the_head_is_noticed(kind, refused):
    model = kind(tiny.config()).eval()
    net = Supernet(model, space_of("llama"), tiny.ADAPTERS["lora"])
    with pytest.raises(ConfigError, match="behind its head") if refused else nullcontext():
        require_cut_head(net, batch_of("ab", "c"))
