"""Active, sliced and merged are one function; what is inactive takes no part in anything."""

from __future__ import annotations

import errno
import os

import pytest
import safetensors
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from elastic.adapters.layers import ElasticLinear, FactorLinear
from elastic.config import AdapterConfig
from elastic.errors import BaseMismatch, RunError
from elastic.models.digest import digest_of
from elastic.models.modules import modules_of, plain_linear
from elastic.spaces.bound import SubAdapter
from elastic.supernet import store
from elastic.supernet.compact import compact, merge_, sliced
from elastic.supernet.cost import Counter, count
from elastic.supernet.store import load_super_adapter
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.laws import MERGED, close, save, several
from tests.helpers.tiny import ALPHA, RANK, logits, tokens

KINDS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
}


# Active


def test_active_restores_also_after_an_exception():
    net = tiny.supernet()
    expected = logits(net.model, tokens())
    with pytest.raises(KeyError), net.active(net.space.minimal()):
        with pytest.raises(KeyError), net.active(net.space.heuristic()):
            raise KeyError
        assert net.current == net.space.minimal()
        raise KeyError
    assert net.current == net.space.maximal()
    assert torch.equal(logits(net.model, tokens()), expected)


def test_a_foreign_sub_adapter_leaves_everything_as_it_was():
    net = tiny.supernet()
    expected = logits(net.model, tokens())
    foreign = SubAdapter((*net.space.minimal().choices[:-1], ("strange", 1)))
    short = SubAdapter(net.space.minimal().choices[:-1])
    for sub in (foreign, short):
        with pytest.raises(RunError, match=r"sub-adapter"), net.active(sub):
            pytest.fail("must not be active")
        assert net.current == net.space.maximal()
        assert torch.equal(logits(net.model, tokens()), expected)


def test_a_new_supernet_computes_the_base_model(tiny_llama):
    expected = logits(tiny_llama, tokens())
    net = Supernet(tiny_llama, tiny.space(), AdapterConfig(rank=RANK))
    close(logits(net.model, tokens()), expected)
    assert not torch.allclose(logits(tiny.randomize_(net).model, tokens()), expected)


# peft 0.21 still reads the old name of a property that transformers renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_maximal_lora_equals_peft():
    net = tiny.supernet()
    theirs = get_peft_model(
        tiny.llama(),
        LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=[name.rpartition(".")[2] for name in net.declared.sections[0].adapt],
            lora_dropout=0.0,
        ),
    ).double()
    state = {}
    for name, tensor in net.factor_state().items():
        site, _, factor = name.rpartition(".")
        state[f"base_model.model.{site}.lora_{factor}.default.weight"] = tensor
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if "lora" in name]
    close(logits(net.model, tokens()), logits(theirs.eval(), tokens()))


def by_hand(net: Supernet, base: nn.Module, sub: SubAdapter, **overrides) -> nn.Module:
    """A plain transformers model of the sizes of `sub` (alike in both layers), its weights sliced
    and summed here from those of the untouched base."""
    sizes = {name.removeprefix("model.layers.0."): size for name, size in sub.choices}
    heads = sizes.get("attention_heads", 2)
    model = tiny.llama(
        intermediate_size=sizes["mlp_width"],
        num_key_value_heads=heads,
        num_attention_heads=2 * heads,
        **overrides,
    )
    rows = {
        "q_proj": 16 * heads, "k_proj": 8 * heads, "v_proj": 8 * heads, "o_proj": 32,
        "gate_proj": sizes["mlp_width"], "up_proj": sizes["mlp_width"], "down_proj": 32,
    }  # fmt: skip
    columns = {"o_proj": 16 * heads, "down_proj": sizes["mlp_width"]}
    ranks = dict.fromkeys(("q_proj", "k_proj", "v_proj"), sizes["attention_rank"])
    ranks |= dict.fromkeys(("gate_proj", "up_proj"), sizes["mlp_rank"]) | {"down_proj": RANK}
    factors, state = net.factor_state(), {}
    for name, tensor in base.state_dict().items():
        site, _, kind = name.rpartition(".")
        leaf = site.rpartition(".")[2]
        if leaf in rows:
            r, c = rows[leaf], columns.get(leaf, 32)
            tensor = tensor[:r, :c] if kind == "weight" else tensor[:r]
            if kind == "weight" and leaf in ranks:
                A, B = factors[f"{site}.A"], factors[f"{site}.B"]
                rank = ranks[leaf]
                tensor = tensor + ALPHA / RANK * B[:r, :rank] @ A[:rank, :c]
        state[name] = tensor
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("which", ["maximal", "minimal", "heuristic", "uniform-.5", "uniform-.8"])
def test_active_equals_a_model_cut_by_hand(kind, heads, which):
    net = tiny.supernet(heads=heads, **KINDS[kind])
    sub = net.space.named(which)
    hand = by_hand(net, tiny.llama(**KINDS[kind]), sub, **KINDS[kind])
    with net.active(sub) as model:
        close(logits(model, tokens()), logits(hand, tokens()), MERGED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [False, True])
def test_active_equals_sliced_equals_merged(kind, heads):
    net = tiny.supernet(heads=heads, **KINDS[kind])
    net.reorder(tiny.permutations(net))
    outputs = []
    for sub in several(net):
        small, plain = sliced(net, sub), compact(net, sub)
        for length in (1, 2, 9):
            ids = tokens(2, length, seed=length)
            with net.active(sub) as model:
                expected = logits(model, ids)
            close(logits(small, ids), expected)
            close(logits(plain, ids), expected, MERGED)
        outputs.append(expected)
    assert not torch.allclose(outputs[0], outputs[1]), "maximal and minimal must differ"


# Training


@pytest.mark.parametrize("which", ["maximal", "minimal", "uniform-.5", "random"])
def test_what_is_inactive_gets_exactly_zero_gradient(which):
    net = tiny.supernet(heads=True)
    with net.active(net.space.named(which)) as model:
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        sizes = {
            site: (layer.size.rows, layer.size.columns, layer.size.rank)
            for site, layer in modules_of(model, ElasticLinear)
        }
    checked = 0
    for site, layer in modules_of(net.model, ElasticLinear):
        assert layer.base.weight.grad is None
        if layer.adapter is None:
            continue
        rows, columns, rank = sizes[site]
        A, B = layer.adapter.A.grad.clone(), layer.adapter.B.grad.clone()
        assert A[:rank, :columns].abs().sum(1).min() > 0, f"{site}: an active rank is not trained"
        assert B[:rows, :rank].abs().sum() > 0
        A[:rank, :columns] = 0
        B[:rows, :rank] = 0
        assert not A.any() and not B.any()
        checked += A.numel() + B.numel()
    assert checked == sum(p.numel() for p in net.model.parameters() if p.requires_grad)


def test_only_factors_are_trained(tiny_llama):
    net = Supernet(tiny_llama.requires_grad_(True), tiny.space(), AdapterConfig(rank=RANK))
    trained = {name for name, p in net.model.named_parameters() if p.requires_grad}
    assert trained == {name.replace(".A", ".adapter.A").replace(".B", ".adapter.B")
                       for name in net.factor_state()}  # fmt: skip


def test_factors_start_alike_for_one_seed_only():
    def start(seed):
        net = Supernet(tiny.llama(), tiny.space(), AdapterConfig(rank=RANK), seed=seed)
        return net.factor_state()

    first, same, other = start(1), start(1), start(2)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[n], other[n]) for n in first if n.endswith("A"))


def test_dropout_acts_on_the_update_alone_and_only_in_training():
    adapter = AdapterConfig(rank=RANK, alpha=ALPHA, dropout=0.5)
    net = tiny.randomize_(Supernet(tiny.llama(), tiny.space(), adapter))
    quiet = logits(net.model, tokens())
    assert torch.equal(quiet, logits(tiny.supernet().model, tokens()))
    net.model.train()
    assert not torch.allclose(logits(net.model, tokens()), quiet)
    for _, layer in modules_of(net.model, ElasticLinear):
        layer.adapter.B.data.zero_()
    close(logits(net.model, tokens()), logits(tiny.llama(), tokens()))


# Order


@pytest.mark.parametrize("kind", KINDS)
def test_reordering_keeps_the_function_at_full_size(kind):
    net = tiny.supernet(heads=True, **KINDS[kind])
    expected = logits(net.model, tokens())
    with net.active(net.space.minimal()) as model:
        before = logits(model, tokens())
    net.reorder(tiny.permutations(net))
    close(logits(net.model, tokens()), expected)
    with net.active(net.space.minimal()) as model:
        assert not torch.allclose(logits(model, tokens()), before), "the order must matter"


def test_reordering_permutes_as_asked():
    net, base = tiny.supernet(heads=True, mlp_bias=True), tiny.llama(mlp_bias=True)
    before = {name: tensor.clone() for name, tensor in net.factor_state().items()}
    order = tiny.permutations(net)
    order["model.layers.1.attention_heads"] = torch.tensor([1, 0])
    net.reorder(order)
    after = net.factor_state()
    mlp, attention = "model.layers.1.mlp.", "model.layers.1.self_attn."
    channels = order["model.layers.1.mlp_width"]
    halves = torch.cat([torch.arange(16, 32), torch.arange(16)])  # two query heads per KV head
    for site, axis, index in [
        (mlp + "gate_proj", 0, channels),
        (mlp + "up_proj", 0, channels),
        (mlp + "down_proj", 1, channels),
        (attention + "q_proj", 0, halves),
        (attention + "k_proj", 0, torch.arange(16).roll(8)),
        (attention + "o_proj", 1, halves),
    ]:
        original, layer = base.get_submodule(site), net.layer(site)
        assert torch.equal(layer.base.weight, original.weight.index_select(axis, index)), site
        if axis == 0 and original.bias is not None:
            assert torch.equal(layer.base.bias, original.bias[index]), site
        if layer.adapter is not None:
            moved, still = ("B", "A") if axis == 0 else ("A", "B")
            expected = before[f"{site}.{moved}"].index_select(axis, index)
            assert torch.equal(after[f"{site}.{moved}"], expected), site
            assert torch.equal(after[f"{site}.{still}"], before[f"{site}.{still}"]), site


def test_cutting_drops_exactly_the_last_channels_of_the_order():
    net = tiny.supernet()
    full = compact(net, net.space.maximal())  # in the original order
    order = tiny.permutations(net)
    net.reorder(order)
    choices = net.space.maximal().as_dict()
    for layer, width in enumerate((16, 48)):
        choices[f"model.layers.{layer}.mlp_width"] = width
        dropped = order[f"model.layers.{layer}.mlp_width"][width:]
        full.model.layers[layer].mlp.down_proj.weight[:, dropped] = 0
    with net.active(SubAdapter(tuple(choices.items()))) as model:
        close(logits(model, tokens()), logits(full, tokens()), MERGED)


def test_channels_are_ordered_once():
    net = tiny.supernet(order=tiny.permutations(tiny.supernet()))
    with pytest.raises(RunError, match="ordered already"):
        net.reorder(tiny.permutations(net))


# Slicing and merging


@pytest.mark.parametrize("tied", [False, True])
def test_slicing_leaves_the_supernet_and_ties_as_they_are(tied):
    net = tiny.supernet(heads=True, tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    net.activate(net.space.heuristic())
    expected = logits(net.model, tokens())
    sub = net.space.minimal()
    small = compact(net, sub)
    for module in small.modules():
        if type(module) is nn.Linear and module is not small.lm_head:
            module.weight.zero_()
    assert net.current == net.space.heuristic()
    assert torch.equal(logits(net.model, tokens()), expected)
    for name, tensor in net.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    assert small.lm_head.weight is net.model.lm_head.weight, "what is not elastic is not copied"
    assert not list(modules_of(small, ElasticLinear)) and not list(modules_of(small, FactorLinear))
    assert all(tensor.is_contiguous() for tensor in small.state_dict().values())


def test_slicing_refuses_foreign_points():
    net = tiny.supernet()
    with pytest.raises(RunError, match="differ in"):
        sliced(net, SubAdapter(()))


def test_merging_bfloat16_rounds_once():
    """The error is half a unit in the last of eight binary places, and float32's own beside it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).bfloat16()
    A = torch.randn(8, 32, generator=generator)
    B = 0.1 * torch.randn(48, 8, generator=generator)
    model = nn.Sequential(FactorLinear(weight, None, A, B))
    exact = weight.double() + B.double() @ A.double()
    half_unit = torch.exp2(torch.frexp(exact).exponent.double() - 9)
    error = (merge_(model)[0].weight.double() - exact).abs()
    assert type(model[0]) is nn.Linear and model[0].weight.dtype == torch.bfloat16
    assert (error <= half_unit + 1e-6).all()
    # Factors cast first would miss this bound: the test can fail.
    twice = weight + (B.bfloat16() @ A.bfloat16())
    assert not ((twice.double() - exact).abs() <= half_unit + 1e-6).all()


# Cost


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [False, True])
def test_counter_equals_counting_the_compact_model(kind, heads):
    net = tiny.supernet(heads=heads, **KINDS[kind])
    plain = tiny.llama(**KINDS[kind])
    counters = [Counter(net.model, net.space), Counter(plain, net.space)]
    assert counters[0].full == counters[1].full == count(plain)
    for sub in several(net, draws=6):
        expected = count(compact(net, sub))
        assert [counter(sub) for counter in counters] == [expected] * 2
    assert counters[0](net.space.minimal()).macs < counters[0].full.macs


def test_macs_are_those_of_the_linear_layers():
    model = nn.Sequential(nn.Embedding(9, 5), plain_linear(torch.zeros(3, 5), None))
    assert (count(model).macs, count(model).params) == (15, 60)


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("ordered", [False, True])
def test_saved_and_loaded_is_the_same_bit_for_bit(tmp_path, ordered):
    order = tiny.permutations(tiny.supernet(heads=True)) if ordered else None
    net = tiny.supernet(heads=True, order=order)
    save(net, tmp_path / "net")
    again = load_super_adapter(tiny.llama(), "sha256:mine", tmp_path / "net")
    assert again.space == net.space and again.adapter == net.adapter
    assert again.declared.as_dict() == net.declared.as_dict()
    assert again.order.keys() == net.order.keys() and bool(net.order) == ordered
    assert all(torch.equal(again.order[name], net.order[name]) for name in net.order)
    state = again.model.state_dict()
    for name, tensor in net.model.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    for sub in several(net):
        with net.active(sub), again.active(sub):
            assert torch.equal(logits(net.model, tokens()), logits(again.model, tokens()))


def test_another_base_is_refused_with_both_digests(tmp_path):
    ours = digest_of(tiny.save_tiny(tmp_path / "ours", seed=0))
    other = digest_of(tiny.save_tiny(tmp_path / "other", seed=1))
    save(tiny.supernet(), tmp_path / "net", ours)
    with pytest.raises(BaseMismatch) as caught:
        load_super_adapter(tiny.llama(), other, tmp_path / "net")
    assert ours != other and ours in str(caught.value) and other in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        # What safetensors raises when the disk is really full; it is no OSError.
        safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        # And tokenizers.
        Exception("No space left on device (os error 28)"),
    ],
    ids=["OSError", "SafetensorError", "Exception"],
)
def test_a_full_disk_leaves_the_old_directory(tmp_path, monkeypatch, error):
    directory = tmp_path / "net"
    save(tiny.supernet(seed=0), directory)
    before = contents(directory)
    real, calls = store.save_file, []

    def second_fails(tensors, filename, *args):
        calls.append(filename)
        if len(calls) == 2:
            raise error
        return real(tensors, filename, *args)

    monkeypatch.setattr(store, "save_file", second_fails)
    with pytest.raises(RunError, match="No space left") as caught:
        save(tiny.supernet(seed=1), directory)
    assert len(calls) == 2 and str(directory) in str(caught.value)
    assert contents(directory) == before
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    save(tiny.supernet(seed=1), directory)
    assert contents(directory)["factors.safetensors"] != before["factors.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_an_incomplete_directory_names_what_is_missing(tmp_path):
    save(tiny.supernet(), tmp_path / "net")
    (tmp_path / "net" / "order.safetensors").unlink()
    with pytest.raises(RunError, match=r"order\.safetensors missing"):
        load_super_adapter(tiny.llama(), "sha256:mine", tmp_path / "net")


def test_factors_of_another_shape_are_refused():
    net = tiny.supernet()
    state = net.factor_state()
    name = next(iter(state))
    with pytest.raises(RunError, match=f"{name} is missing"):
        net.load_factors({key: value for key, value in state.items() if key != name})
    with pytest.raises(RunError, match=r"is \(3, 32\), the model wants \(8, 32\)"):
        net.load_factors({**state, name: torch.zeros(3, 32)})
