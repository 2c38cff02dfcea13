"""What several tests hold a supernet to: active, sliced, merged and streamed are one function, and
the slope of a loss."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from elastic.config import ModelConfig
from elastic.data.answers import answer_logits, answer_loss
from elastic.data.collating import collate
from elastic.data.encoding import encode
from elastic.formats import hf
from elastic.models.modules import linear_
from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact, sliced
from elastic.supernet.compensation import Compensation
from elastic.supernet.cost import Counter, count
from elastic.supernet.store import save_super_adapter
from elastic.supernet.streaming import streamed
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import FAMILIES, model_of

MERGED = 1e-9
"""Of the largest logit: W x + B (A x) and (W + B A) x round differently, over two layers."""


def close(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-12) -> None:
    assert expected.abs().max() > 0.1, "a comparison of zeros proves nothing"
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=relative * float(expected.abs().max())
    )


def one_function(
    net: Supernet,
    sub: SubAdapter,
    compute: Callable[[PreTrainedModel], torch.Tensor],
    precision: float,
    degree: float = 0.0,
) -> tuple[torch.Tensor, PreTrainedModel]:
    """What `sub` computes, and its compact model: active, sliced and merged it is the same, and the
    counter counts it."""
    with torch.no_grad():
        with net.active(sub, degree):
            expected = compute(net.model)
        small = compact(net, sub, degree)
        close(compute(sliced(net, sub, degree)), expected, precision)
        close(compute(small), expected, precision)
    assert Counter(net.model, net.space)(sub) == count(small)
    return expected, small


def every_factor_learns(net: Supernet, output: Callable[[PreTrainedModel], torch.Tensor]) -> None:
    """Of the minimal sub-adapter, none is left without a gradient."""
    with net.active(net.space.minimal()) as model:
        (output(model) * torch.randn(output(model).shape, dtype=torch.float64)).sum().backward()
    for site, adapter in net.adapters():
        for name, parameter in adapter.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, (site, name)


def several(net: Supernet, draws: int = 3) -> list[SubAdapter]:
    generator = random.Random(0)
    named = [net.space.maximal(), net.space.minimal(), net.space.heuristic()]
    return named + [net.space.random(generator) for _ in range(draws)]


def some_moments(net: Supernet, ridge: float = 0.01) -> Compensation:
    """Of inputs that depend on one another."""
    generator = torch.Generator().manual_seed(1)
    known = {}
    for site in net.space.reading:
        n = net.layer(site).base.in_features
        x = torch.randn(2 * n, n, generator=generator) @ torch.randn(n, n, generator=generator)
        known[site] = x.T @ x / len(x)
    return Compensation(known, ridge)


# The directory of a super-adapter


def save(net: Supernet, directory, digest: str = "sha256:mine") -> None:
    save_super_adapter(net, directory, model=ModelConfig(path="tiny"), base_digest=digest, seed=3)


STEP = 1e-4


def batch_of(*prompts: str) -> dict[str, torch.Tensor]:
    tokenizer = tiny.tokenizer()
    return collate([encode(tokenizer, prompt, "bad") for prompt in prompts], 0)


def loss(net, batch) -> float:
    with torch.no_grad():
        return float(answer_loss(*answer_logits(net.model, batch)))


def without_data(base, net, space, method, order) -> Supernet:
    with torch.device("meta"):
        shell = type(base)(copy.deepcopy(base.config)).to(base.dtype)
    bare = Supernet(linear_(shell), space, tiny.ADAPTERS[method], order=order, start=False)
    bare.load_factors(net.factor_state())
    return bare


def pair(family: str, method: str = "lora") -> tuple[PreTrainedModel, Supernet, Supernet]:
    """The untouched base, a supernet of it with channels in another order, and the same without
    data."""
    base = model_of(family)
    space = SearchSpace.load(FAMILIES[family][1])
    net = Supernet(copy.deepcopy(base), space, tiny.ADAPTERS[method])
    order = tiny.permutations(net)
    net.reorder(order)
    tiny.randomize_(net)
    return base, net, without_data(base, net, space, method, order)


def same(base, net, bare, degree: float = 0.0) -> None:
    head = {name: x.detach() for name, x in net.head.items()}
    for sub in several(net, draws=1):
        expected = compact(net, sub, degree).state_dict()
        found = streamed(base, bare, sub, head, degree)
        assert list(found.tensors) == list(expected)
        for name, tensor in expected.items():
            made = found.tensors[name]()
            assert torch.equal(made, tensor), name
            assert found.model.state_dict()[name].shape == made.shape
            assert found.model.state_dict()[name].dtype == made.dtype


def mixed(net):
    """A sub-adapter whose layers differ."""
    subs = (net.space.random(random.Random(seed)) for seed in range(20))
    return next(sub for sub in subs if not hf.is_plain(compact(net, sub)))
