"""Laws that every method keeps, over the product of methods and sub-adapters."""

import dataclasses
import random
import re
import typing

import pytest
import torch

from elastic.adapters import METHODS, check
from elastic.adapters.base import Adapter
from elastic.config import AdapterConfig, OloraConfig, ProloraConfig, SorsaConfig, SosLoraConfig
from elastic.errors import ConfigError, RunError
from elastic.supernet.compact import compact, sliced
from elastic.supernet.store import load_super_adapter
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.laws import MERGED, close, save
from tests.helpers.tiny import ADAPTERS, ALPHA, RANK, logits, tokens

WHICH = ["maximal", "minimal", "heuristic", "uniform-.6", "random"]
SOS_TOTAL = AdapterConfig(method="soslora", rank=8, soslora=SosLoraConfig(experts=4))


def adapter_of(config: AdapterConfig, out: int = 20, into: int = 12, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    adapter = METHODS[config.method](config, out, into, dtype=torch.float64)
    adapter.start(torch.randn(out, into, generator=generator, dtype=torch.float64), generator)
    return adapter


def noisy_(adapter: Adapter) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(0.2 * noise)
    return adapter


def test_the_config_offers_exactly_the_methods():
    hint = typing.get_type_hints(AdapterConfig)["method"]
    assert set(typing.get_args(hint)) == {"auto", *METHODS}
    assert {config.resolved_method for config in ADAPTERS.values()} == set(METHODS)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("method", ADAPTERS)
def test_active_equals_sliced_equals_merged(method, which):
    net = tiny.supernet(method, heads=True)
    net.reorder(tiny.permutations(net))
    sub = net.space.named(which)
    for length in (1, 9):
        ids = tokens(2, length, seed=length)
        with net.active(sub) as model:
            expected = logits(model, ids)
        close(logits(sliced(net, sub), ids), expected)
        close(logits(compact(net, sub), ids), expected, MERGED)
    plain = compact(Supernet(tiny.llama(), tiny.space(heads=True), ADAPTERS[method],
                             order=net.order), sub)  # fmt: skip
    assert not torch.allclose(expected, logits(plain, ids), atol=0.01), "the update must show"


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("method", ADAPTERS)
def test_every_sub_adapter_starts_as_the_base_model_cut(method, which):
    """For SORSA this says that cutting ranks removes no pretrained direction."""
    fresh = Supernet(tiny.llama(), tiny.space(heads=True), ADAPTERS[method])
    plain = Supernet(tiny.llama(), tiny.space(heads=True), AdapterConfig(rank=RANK))
    for _, adapter in plain.adapters():
        assert not adapter.B.any()
    expected = logits(compact(plain, plain.space.named(which)), tokens())
    close(logits(compact(fresh, fresh.space.named(which)), tokens()), expected, MERGED)


@pytest.mark.parametrize("kept", [1, 3])
def test_a_cut_of_sorsa_restores_the_triplets_beyond_it(kept):
    config = dataclasses.replace(ADAPTERS["sorsa"], rank=6, alpha=None)
    adapter = adapter_of(config)
    noisy_(adapter)
    A, B = adapter.factors(kept)
    for i in range(kept, 6):  # trained ones beyond the rank must not matter
        adapter.A.data[i] = 0
        adapter.B.data[:, i] = 0
    again = adapter.factors(kept)
    assert torch.equal(A, again[0]) and torch.equal(B, again[1])
    # In the span of an untouched singular direction the update does nothing.
    direction = adapter.A0[5]
    for i in range(kept):
        adapter.A.data[i] = adapter.A0[i] * 1.5
    A, B = adapter.factors(kept)
    assert (B @ A @ direction).abs().max() < 1e-12


@pytest.mark.parametrize("method", [*ADAPTERS, "soslora-total", "soslora-experts"])
def test_factors_nest(method):
    if method.startswith("soslora-"):
        elastic = {"soslora-total": "rank", "soslora-experts": "experts"}[method]
        config = dataclasses.replace(SOS_TOTAL, soslora=SosLoraConfig(experts=4, elastic=elastic))
        ranks = (4,) if elastic == "rank" else (2, 4, 6)
    else:
        config, ranks = ADAPTERS[method], (1, 3, 5)
    adapter = noisy_(adapter_of(config))
    if config.method == "olora":
        adapter.succeed(adapter.state_dict(), torch.Generator().manual_seed(2))
        noisy_(adapter)
    A, B = adapter.factors(adapter.max_rank)
    assert A.shape[0] == B.shape[1]
    sizes = []
    for rank in ranks:
        small_A, small_B = adapter.factors(rank)
        assert torch.equal(small_A, A[: len(small_A)])
        assert torch.equal(small_B, B[:, : small_B.shape[1]])
        sizes.append(len(small_A))
    assert sizes == sorted(set(sizes)) and sizes[-1] < len(A)


@pytest.mark.parametrize("method", ADAPTERS)
def test_the_factor_rank_is_what_the_method_needs(method):
    adapter = noisy_(adapter_of(dataclasses.replace(ADAPTERS[method], rank=4), 40, 30))
    A, B = adapter.factors(3)
    needed = {"sorsa": 6, "soslora": 6}.get(ADAPTERS[method].resolved_method, 3)
    assert len(A) == needed
    assert int(torch.linalg.matrix_rank(B @ A)) == needed


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("method", [*ADAPTERS])
def test_reordering_permutes_the_update(method, axis):
    adapter = noisy_(adapter_of(ADAPTERS[method]))
    if method == "olora":
        adapter.succeed(adapter.state_dict(), torch.Generator().manual_seed(2))
        noisy_(adapter)
    A, B = adapter.factors(5)
    before = (B @ A).detach()
    index = torch.randperm(20 if axis == "out" else 12, generator=torch.Generator().manual_seed(0))
    penalty = adapter.penalty(5)
    adapter.reorder(axis, index)
    A, B = adapter.factors(5)
    expected = before[index] if axis == "out" else before[:, index]
    torch.testing.assert_close((B @ A).detach(), expected, rtol=0, atol=1e-12)
    if penalty is not None:  # norms and angles do not see the order
        torch.testing.assert_close(adapter.penalty(5), penalty)


@pytest.mark.parametrize("method", ADAPTERS)
def test_saved_and_loaded_again_bit_for_bit(method, tmp_path):
    net = tiny.supernet(method, heads=True)
    net.reorder(tiny.permutations(net))
    save(net, tmp_path / "net")
    loaded = load_super_adapter(tiny.llama(), "sha256:mine", tmp_path / "net")
    assert loaded.adapter == net.adapter
    for name, tensor in net.factor_state().items():
        assert torch.equal(tensor, loaded.factor_state()[name]), name
    for which in WHICH:
        sub = net.space.named(which)
        with net.active(sub) as one, loaded.active(sub) as other:
            assert torch.equal(logits(one, tokens()), logits(other, tokens()))


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_bfloat16_base_keeps_float32_factors(method):
    net = tiny.supernet(method, dtype=torch.bfloat16)
    for _, adapter in net.adapters():
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    exact = tiny.supernet(method, dtype=torch.float32)
    net.load_factors(exact.factor_state())
    found, expected = (logits(n.model, tokens()).float() for n in (net, exact))
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_sorsa_loses_nothing_in_bfloat16():
    """The change is far below the rounding of the singular vectors themselves."""
    adapter = adapter_of(AdapterConfig(method="sorsa", rank=4))
    adapter.A.data += 1e-5 * torch.randn(
        4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    A, B = (factor.detach() for factor in adapter.factors(4))
    exact, rounded = B @ A, B.bfloat16().double() @ A.bfloat16().double()
    assert (rounded - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("method", ["sorsa", "olora", "soslora"])
def test_a_penalty_leaves_inactive_ranks_alone(method, rank):
    adapter = noisy_(adapter_of(ADAPTERS[method]))
    if method == "olora":
        adapter.succeed(adapter.state_dict(), torch.Generator().manual_seed(2))
        noisy_(adapter)
    adapter.penalty(rank).backward()
    active = {"A": (0, rank), "B": (1, rank), "S": (0, rank)}
    if method == "soslora":
        active = {"A": (1, rank), "B": (2, rank)}
    seen = 0
    for name, (dim, size) in active.items():
        parameter = getattr(adapter, name, None)
        if parameter is None or parameter.grad is None:
            continue
        rest = parameter.grad.narrow(dim, size, parameter.shape[dim] - size)
        assert not rest.any()
        assert parameter.grad.any()
        seen += 1
    assert seen


def test_the_squared_form_of_sorsa_fades():
    config = AdapterConfig(method="sorsa", rank=4, sorsa=SorsaConfig(gamma=1.0))
    squared = dataclasses.replace(config, sorsa=SorsaConfig(gamma=1.0, regulariser="squared"))
    lengths = {}
    for name, settings in (("norm", config), ("squared", squared)):
        for stretch in (1e-2, 1e-4):
            adapter = adapter_of(settings)
            adapter.A.data *= 1 + stretch
            adapter.penalty(4).backward()
            lengths[name, stretch] = float(adapter.A.grad.norm())
    assert lengths["norm", 1e-4] == pytest.approx(lengths["norm", 1e-2], rel=0.05)
    assert lengths["squared", 1e-4] == pytest.approx(lengths["squared", 1e-2] / 100, rel=0.05)


def test_randomized_svd_finds_the_leading_triplets():
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(60, 50, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(50, 50, generator=generator, dtype=torch.float64)).Q
    weight = U * 0.8 ** torch.arange(50).double() @ V.T
    exact, quick = (
        METHODS["sorsa"](
            AdapterConfig(method="sorsa", rank=6, sorsa=SorsaConfig(svd=svd)),
            60, 50, dtype=torch.float64,
        )
        for svd in ("exact", "randomized")
    )  # fmt: skip
    exact.start(weight, generator)
    state = torch.random.get_rng_state()
    quick.start(weight, torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is not used"
    torch.testing.assert_close(quick.S, exact.S, rtol=1e-6, atol=0)
    torch.testing.assert_close((quick.B * quick.S) @ quick.A, (exact.B * exact.S) @ exact.A,
                               rtol=0, atol=1e-5)  # fmt: skip
    assert quick.penalty(6).item() < 1e-10


def test_prolora_ablations():
    def full(**settings):
        config = AdapterConfig(
            method="prolora", rank=6, prolora=ProloraConfig(share_in=2, share_out=2, **settings)
        )
        return noisy_(adapter_of(config, 20, 12)).factors(6)

    A, B = full(unshared_rank=0, rotation=False)  # broadcast only
    assert torch.equal(A[:, :6], A[:, 6:]) and torch.equal(B[:10], B[10:])
    A, B = full(unshared_rank=0)
    assert torch.equal(A[:, :6].roll(-3, 0), A[:, 6:]) and torch.equal(B[:10].roll(-3, 1), B[10:])
    A, _ = full(unshared_rank=2, rotation=False)
    assert torch.equal(A[2:, :6], A[2:, 6:]) and not torch.equal(A[:2, :6], A[:2, 6:])


def test_dropout_of_soslora_acts_behind_the_first_factor():
    settings = dataclasses.replace(ADAPTERS["soslora"], dropout=0.5)
    nets = {}
    for place in ("rank", "input"):
        config = dataclasses.replace(
            settings, soslora=dataclasses.replace(settings.soslora, dropout_on=place)
        )
        nets[place] = tiny.randomize_(Supernet(tiny.llama(), tiny.space(), config))
    close(logits(nets["rank"].model, tokens()), logits(nets["input"].model, tokens()))
    layer = nets["rank"].layer("model.layers.0.mlp.up_proj").train()
    A, B = layer.factors()
    x = torch.ones(1, A.shape[1]).double()
    torch.manual_seed(0)
    update = layer(x) - torch.nn.functional.linear(x, layer.weight)
    torch.manual_seed(0)
    expected = layer.dropout(x @ A.T) @ B.T
    torch.testing.assert_close(update, expected)
    assert nets["input"].layer("model.layers.0.mlp.up_proj").adapter.dropout_on_rank is False


def test_fixed_scales_freeze_scales_and_gates():
    config = dataclasses.replace(
        ADAPTERS["soslora"],
        soslora=SosLoraConfig(experts=2, rank_mode="expert", fixed_scales=True),
    )
    adapter = noisy_(adapter_of(config))
    trained = {name for name, p in adapter.named_parameters() if p.requires_grad}
    assert trained == {"A", "B"}
    adapter.penalty(RANK).backward()
    assert adapter.A.grad.any() and adapter.gate_logits.grad is None


# Bad input


def refused(config: AdapterConfig, match: str, error=ConfigError) -> None:
    model = tiny.llama()
    with pytest.raises(error, match=match):
        check(config, model, tiny.space().bind(model, config.rank))


def test_ranks_that_do_not_fit_are_refused_before_anything_is_built():
    wide = AdapterConfig(method="sorsa", rank=17)
    refused(wide, r"k_proj: sorsa: rank 17 exceeds the 16 singular values")
    few = AdapterConfig(method="prolora", rank=8, prolora=ProloraConfig(unshared_rank=3))
    refused(few, r"rank 1 is below the 3 unshared ranks")
    uneven = dataclasses.replace(SOS_TOTAL, soslora=SosLoraConfig(experts=2))
    refused(uneven, r"rank 1 is no multiple of 2")
    with pytest.raises(ConfigError, match=r"unshared_rank is 9, above adapter.rank 8"):
        AdapterConfig(method="prolora", rank=8, prolora=ProloraConfig(unshared_rank=9))
    with pytest.raises(ConfigError, match=r"rank 10 is not divisible by adapter.soslora.experts 4"):
        AdapterConfig(method="soslora", rank=10)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SorsaConfig(gamma=-1.0),
        lambda: ProloraConfig(share_in=0),
        lambda: OloraConfig(lambda_1=-0.5),
        lambda: SosLoraConfig(experts=0),
        lambda: SosLoraConfig(gate_end=0.0),
        lambda: SosLoraConfig(orth_ramp=1.5),
        lambda: AdapterConfig(lr_ratio=0.0),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ConfigError, match=r"adapter\.\w+(\.\w+)? is"):
        make()


@pytest.mark.parametrize("method", ADAPTERS)
def test_strange_factors_are_refused_by_name(method):
    net = tiny.supernet(method)
    state = net.factor_state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    site = "model.layers.1.mlp.up_proj"
    name = sorted(key for key in state if key.startswith(site))[0]
    rest = {key: value for key, value in state.items() if key != name}
    with pytest.raises(RunError, match=f"{re.escape(name)} is missing"):
        net.load_factors(rest)
    with pytest.raises(RunError, match=rf"{site}\.C is unknown"):
        net.load_factors({**state, f"{site}.C": torch.zeros(1)})
    with pytest.raises(RunError, match="belongs to no layer"):
        net.load_factors({**state, "model.norm.A": torch.zeros(1)})
    broken = state[name].clone()
    broken.view(-1)[0] = float("nan")
    with pytest.raises(RunError, match=f"{re.escape(name)} holds NaN"):
        net.load_factors({**state, name: broken})
    first = state[name][..., :-1] if state[name].ndim else torch.zeros(2)
    with pytest.raises(RunError, match="the model wants"):
        net.load_factors({**state, name: first})
    assert all(torch.equal(before[key], value) for key, value in net.factor_state().items())


def test_ranks_of_random_sub_adapters_are_all_offered():
    net = tiny.supernet("prolora")
    for seed in range(5):
        assert net.space.random(random.Random(seed))
    assert net.layer(net.space.targets[0]).adapter.scale == ALPHA / RANK
